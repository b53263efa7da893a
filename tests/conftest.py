"""Tiny real models, built once per test run with fixed seeds."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.ray_cluster import Cluster

# Where scripts/fetch_models.sh puts the real models that slow tests use.
REAL_MODELS = Path(os.environ.get("LLMFAST_MODELS", Path(__file__).parent.parent / ".models"))

# Differences between the architectures of the direct route, at sizes that exercise them.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.3,
    "logits_scaling": 1.5,
}
PHI3_LONGROPE = {
    "pad_token_id": 0,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8],
        "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    },
}
QWEN3_MOE = {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0}),
    "gemma3_text": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": (
        "phi3",
        {"pad_token_id": 0, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "head_dim": 32},
    ),
    "phi3-longrope": ("phi3", PHI3_LONGROPE),
    "smollm3": (
        "smollm3",
        {"pad_token_id": 0, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 16},
    ),
    "olmo2": ("olmo2", {"pad_token_id": 0}),
    "granite": ("granite", GRANITE),
    "granite-tied": ("granite", GRANITE | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_inner": 96}),
    "gpt_neox": (
        "gpt_neox",
        {"num_attention_heads": 2, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-odd-rotary": ("gpt_neox", {"hidden_size": 96, "num_attention_heads": 2, "use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 96}),
    "opt-norm-after": ("opt", {"ffn_dim": 96, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "phi": ("phi", {"num_attention_heads": 2}),
    "starcoder2": ("starcoder2", {"sliding_window": 16}),
    "stablelm": ("stablelm", {"hidden_size": 128, "num_attention_heads": 2}),
    "stablelm-parallel": (
        "stablelm",
        {"hidden_size": 128, "num_attention_heads": 2, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe-unnormalized": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": False}),
    "cohere": ("cohere", {"pad_token_id": 0, "logit_scale": 0.8}),
}


def make_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer: three special tokens, all bytes, and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_checkpoint(folder: Path, model_type: str, settings: dict[str, Any], seed: int = 0) -> Path:
    """Write a random decoder as `save_pretrained` does, biases and norms not left at their initial 0 and 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the checkpoint of a name in `ARCHITECTURES`; do not change it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = write_checkpoint(folder, *ARCHITECTURES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def fp32_bundle(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a tied llama; do not change it."""
    from llmfast.export.stage import export

    output = tmp_path_factory.mktemp("bundles") / "fp32"
    export(str(checkpoints("llama-tied")), output)
    return output


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that exports a family's head for a task, once; do not change the files."""
    from tests.tiny_tasks import export_head

    @functools.cache
    def get(task: str, model_type: str = "bert") -> Any:
        return export_head(tmp_path_factory.mktemp("head"), task, model_type)

    return get


@pytest.fixture
def own_checkpoint(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoints("llama-tied"), tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return Chromium, driven by selenium, which keeps what a page logs."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pytest.importorskip("ray", reason="ray is not installed: pip install 'llmfast[ray]'")
    made = Cluster()
    yield made
    made.close()
