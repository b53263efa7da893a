"""Tiny random encoders of images as Hugging Face folders, and image files of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

PROCESSORS = {
    "BitImageProcessor": BitImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "DeiTImageProcessor": DeiTImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}
_SIDE = 16
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": _SIDE,
    "patch_size": 4,
    "mlp_ratio": 2,
    "id2label": {0: "cat", 1: "dog", 2: "tree"},
}
_SQUARE = {"height": _SIDE, "width": _SIDE}
# DeiT has two classes for the task; as in every checkpoint, the config says which.
_ARCHITECTURES = {"deit": {"architectures": ["DeiTForImageClassification"]}}
_OWN_PROCESSORS: dict[str, Any] = {
    "deit": lambda: DeiTImageProcessorPil(size={"height": 18, "width": 18}, crop_size=_SQUARE),
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 18}, crop_size=_SQUARE),
    "vit": lambda: ViTImageProcessorPil(size=_SQUARE),
}


def save_image_encoder(
    folder: Path, model_type: str = "vit", auto_model: str = "AutoModelForImageClassification", **settings: Any
) -> Any:
    """Save a classifier, or another model, with random weights, biases and norms included, and its processor."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **_SIZES | _ARCHITECTURES.get(model_type, {}) | settings)
    model = getattr(transformers, auto_model).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _OWN_PROCESSORS[model_type]().save_pretrained(folder)
    return model


def save_clip(folder: Path, **settings: Any) -> Any:
    """Save a CLIP with random weights, its processor, and a tokenizer of characters and one word; return it."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99, "vocab_size": 100}
    config = transformers.CLIPConfig(
        text_config=sizes | {"hidden_size": 32, "max_position_embeddings": 40} | tokens | settings,
        vision_config=sizes | {"hidden_size": 48, "image_size": _SIDE, "patch_size": 4},
        projection_dim=24,
    )
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    characters = "abcdefghijklmnopqrstuvwxyz.,!?"
    pieces = [*characters, *(f"{one}</w>" for one in characters), "ph", "oto</w>", "ot", "o</w>o", "photo</w>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary |= {"<|startoftext|>": 98, "<|endoftext|>": 99}
    merges = [("o", "t"), ("ot", "o</w>"), ("p", "h"), ("ph", "oto</w>")]
    transformers.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=_SQUARE).save_pretrained(folder)
    return model


def save_images(folder: Path) -> list[Path]:
    """Save smooth images with noise, of several sizes, modes and formats."""
    rng = np.random.default_rng(0)
    paths = []
    for name, mode, (width, height) in (
        ("wide.png", "RGB", (41, 23)),
        ("tall.jpg", "RGB", (19, 50)),
        ("small.bmp", "RGB", (5, 7)),
        ("gray.png", "L", (30, 30)),
        ("clear.png", "RGBA", (24, 33)),
        ("few.gif", "P", (22, 20)),
        ("turned.jpg", "RGB", (40, 20)),
    ):
        slopes = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
        pixels = (slopes * rng.uniform(0.3, 1, 4) + rng.uniform(0, 5, (height, width, 4))).astype(np.uint8)
        image = Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "P" else mode).convert(mode)
        exif = image.getexif()
        if name.startswith("turned"):
            exif[0x0112] = 6  # orientation: the camera was held upright
        image.save(folder / name, **({"exif": exif} if name.endswith(".jpg") else {}))
        paths.append(folder / name)
    return paths
