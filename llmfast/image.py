"""Image files as a model's inputs: what preprocessor_config.json says, done with Pillow and NumPy.

The steps and their rounding are those of the Pillow image processors of transformers: resize, center crop,
rescale, normalize. A field that would change the result and is not understood is an error, not a guess.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.errors import InputError, UnsupportedError
from llmfast.preprocessor import read_preprocessor

_HALVES = [0.5, 0.5, 0.5]
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers
_RESAMPLING = range(6)
_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": _HALVES,
    "image_std": _HALVES,
    "crop_size": None,
}
_CLIP = {
    "do_center_crop": True,
    "resample": _BICUBIC,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
# What a processor of transformers does where the file does not say; one side alone is a square or the shortest edge.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "BitImageProcessor": _COMMON | _CLIP,
    "CLIPImageProcessor": _COMMON | _CLIP,
    "DeiTImageProcessor": _COMMON
    | {
        "do_center_crop": True,
        "resample": _BICUBIC,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
    },
    "ViTImageProcessor": _COMMON | {"resample": _BILINEAR, "size": {"height": 224, "width": 224}},
}
# Every image is turned into RGB with the channel first; the rest are names.
_WITHOUT_EFFECT = {
    "_valid_processor_keys": None,
    "data_format": "channels_first",
    "default_to_square": None,
    "do_convert_rgb": None,
    "feature_extractor_type": None,
    "image_processor_type": None,
    "processor_class": None,
}


@dataclass(frozen=True)
class ImageProcessor:
    """The steps from a file to a model's input.

    Attributes:
        size: (height, width) to resize to, or the length of the shortest edge; None does not resize.
        resample: Pillow's number of the filter.
        crop: (height, width) of the center that is kept; None keeps all.
        scale: what 8-bit values are multiplied by; None leaves them.
        mean: per channel, subtracted after scaling; None leaves the values.
        std: per channel, what they are divided by then.
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def load(cls, folder: Path) -> "ImageProcessor":
        """Read preprocessor_config.json.

        Raises:
            InputError: missing or malformed.
            UnsupportedError: another processor, or a field that is not understood.
        """
        path, config = read_preprocessor(folder, "images become")
        defaults = _DEFAULTS.get(kind := _kind(config))
        if defaults is None:
            raise UnsupportedError(
                f"`{path}`: image processor `{kind}` is not supported", f"supported: {', '.join(_DEFAULTS)}"
            )
        for key, value in config.items():
            harmless = key in _WITHOUT_EFFECT and _WITHOUT_EFFECT[key] in (None, value)
            if key not in defaults and not harmless and value not in (None, False):
                raise UnsupportedError(f"`{path}`: `{key}` of {value!r} is not supported")
        settings = defaults | {key: value for key, value in config.items() if key in defaults and value is not None}
        try:
            square = bool(config.get("default_to_square", "shortest_edge" not in defaults["size"]))
            return cls._from_settings(settings, square)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"malformed `{path}`: {error}") from error

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], square: bool) -> "ImageProcessor":
        crop = _size(settings["crop_size"], True) if settings["do_center_crop"] else None
        if isinstance(crop, int):
            raise ValueError("`crop_size` has no height and width")
        if settings["resample"] not in _RESAMPLING:
            raise ValueError(f"`resample` {settings['resample']!r} is no filter of Pillow")
        normalizes = settings["do_normalize"]
        return cls(
            size=_size(settings["size"], square) if settings["do_resize"] else None,
            resample=int(settings["resample"]),
            crop=crop,
            scale=float(settings["rescale_factor"]) if settings["do_rescale"] else None,
            mean=_per_channel(settings["image_mean"], "image_mean") if normalizes else None,
            std=_per_channel(settings["image_std"], "image_std") if normalizes else None,
        )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """The height and width of every result; None when they follow the image's."""
        if self.crop is not None:
            return self.crop
        return self.size if isinstance(self.size, tuple) else None

    def read(self, path: Path) -> np.ndarray:
        """Read an image file, float32 [3, height, width].

        An image is turned as its EXIF says and converted to RGB, as transformers' pipelines do.

        Raises:
            InputError: missing, or no image that Pillow reads.
            UnsupportedError: Pillow is not installed.
        """
        image = _open(path)
        if self.size is not None:
            image = image.resize(self._resized(*image.size), resample=self.resample)
        values: np.ndarray = np.asarray(image).transpose(2, 0, 1)
        if self.crop is not None:
            values = center_crop(values, self.crop)
        values = (values.astype(np.float64) * (1.0 if self.scale is None else self.scale)).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
            values = (values - mean) / std
        return values

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) that an image is resized to."""
        if isinstance(self.size, tuple):
            return self.size[::-1]
        assert self.size is not None
        short, long = sorted((width, height))
        other = int(self.size * long / short)
        return (self.size, other) if width <= height else (other, self.size)


def center_crop(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keep the center of an image, with zeros around one that is smaller.

    Args:
        values: [channels, height, width].
        size: (height, width) of the result.
    """
    result = np.zeros((len(values), *size), values.dtype)
    into: list[slice] = [slice(None)]
    kept: list[slice] = [slice(None)]
    for have, want in zip(values.shape[1:], size, strict=True):
        offset, count = (have - want) // 2, min(have, want)
        kept.append(slice(max(0, offset), max(0, offset) + count))
        into.append(slice(max(0, -offset), max(0, -offset) + count))
    result[tuple(into)] = values[tuple(kept)]
    return result


def _kind(config: Mapping[str, Any]) -> str:
    """Return the processor's class as it is called today: `ViTFeatureExtractor` is a `ViTImageProcessor`."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _size(value: Any, square: bool) -> tuple[int, int] | int:
    """Read `{"height", "width"}`, `{"shortest_edge"}` or one number, which is a square's side or the shortest edge."""
    if isinstance(value, dict):
        given = {key: int(size) for key, size in value.items() if size is not None}
        if set(given) == {"shortest_edge"}:
            return _positive(given["shortest_edge"])
        if set(given) == {"height", "width"}:
            return _positive(given["height"]), _positive(given["width"])
        raise ValueError(f"a size of {', '.join(value)}; supported: height and width, or shortest_edge")
    return (_positive(int(value)),) * 2 if square else _positive(int(value))


def _positive(size: int) -> int:
    if size < 1:
        raise ValueError(f"a size of {size}")
    return size


def _per_channel(value: Any, name: str) -> tuple[float, ...]:
    numbers = tuple(float(number) for number in (value if isinstance(value, list) else [value] * 3))
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "image_std" and 0 in numbers):
        raise ValueError(f"`{name}` is {value}")
    return numbers


def _open(path: Path) -> Any:
    """Return an image as Pillow has it, RGB."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UnsupportedError(
            "images need `pillow`, which is not installed", "pip install 'llmfast[vision]'"
        ) from error
    if not path.is_file():
        raise InputError(f"not found: `{path}`", "--image takes an image file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's decoders raise many kinds: of files that are no image, truncated, malformed, or bombs.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"not an image: `{path}`: {str(error).splitlines()[0]}") from error
