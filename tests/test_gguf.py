"""GGUF files of every architecture are the model they were made from; what is left out of one is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from llmfast.errors import InputError, ResourceError, UnsupportedError
from llmfast.export.architectures import describe, supported_model_types
from llmfast.export.checkpoint import SafetensorsCheckpoint, open_checkpoint
from llmfast.export.decoder import DecoderGraph
from llmfast.export.gguf_architectures import ARCHITECTURES
from llmfast.export.gguf_checkpoint import GgufCheckpoint
from llmfast.export.stage import export
from llmfast.infer.engine import Engine
from tests.conftest import LLAMA3_ROPE, SIZES, write_checkpoint
from tests.tiny_gguf import add_tokenizer, finish, write_gguf

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LONG = [float(value) for value in np.linspace(1.0, 9.0, 8)]
_SHORT = [float(value) for value in np.linspace(1.0, 2.0, 8)]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": _SHORT,
    "long_factor": _LONG,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.25,
}


def _llama3_factors() -> np.ndarray:
    """Compute the table of `rope_freqs.weight` as the converter does, for heads of 16."""
    frequencies = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    factor, low, high, original = 8.0, 1.0, 4.0, 64
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


# GGUF's architecture, model_type, settings of the config, metadata beyond the sizes, tables.
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "llama": ("llama", "llama", {"tie_word_embeddings": False}, {"rope.dimension_count": 16}, {}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}, {}),
    "llama-tied": ("llama", "llama", {"tie_word_embeddings": True, "head_dim": 32}, {}, {}),
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3_ROPE}, {}, {"rope_freqs.weight": _llama3_factors()}),
    "llama-linear": (
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {},
    ),
    "llama-old-linear": (
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope.scale_linear": 4.0},
        {},
    ),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}, {}, {}),
    "qwen2-yarn": (
        "qwen2",
        "qwen2",
        {"rope_parameters": _YARN},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
        {},
    ),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}, {}, {}),
    "qwen3-narrow": ("qwen3", "qwen3", {"head_dim": 16}, {}, {}),  # the config's own default is 128
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 4, "pad_token_id": None}, {}, {}),
    "olmo2": ("olmo2", "olmo2", {"pad_token_id": None}, {}, {}),
    "granite": (
        "granite",
        "granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
        {"attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 4.0},
        {},
    ),
    "phi3": (
        "phi3",
        "phi3",
        {"pad_token_id": None, "sliding_window": 16, "original_max_position_embeddings": 512},
        {
            "attention.sliding_window": 16,
            "rope.dimension_count": 16,
            "rope.scaling.original_context_length": 512,
            "attention.key_length": None,
        },
        {},
    ),
    "phi3-longrope": (
        "phi3",
        "phi3",
        {"pad_token_id": None, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64},
        {
            "attention.sliding_window": 0,
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 1.25,
        },
        {
            "rope_factors_short.weight": np.array(_SHORT, np.float32),
            "rope_factors_long.weight": np.array(_LONG, np.float32),
        },
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {"attention.sliding_window": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "num_hidden_layers": 6,
            "rope_parameters": _GEMMA3_ROPE,
        },
        {
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "gpt2": (
        "gpt2",
        "gpt2",
        {"n_inner": 96},
        {
            "attention.head_count_kv": None,
            "attention.key_length": None,
            "attention.value_length": None,
            "rope.dimension_count": None,
            "feed_forward_length": 96,
        },
        {},
    ),
    "gptneox": (
        "gptneox",
        "gpt_neox",
        {"rotary_pct": 0.5, "rope_parameters": None, "use_parallel_residual": True},
        {"rope.dimension_count": 8, "use_parallel_residual": True, "attention.head_count_kv": None},
        {},
    ),
    "gptneox-serial": (
        "gptneox",
        "gpt_neox",
        {"rotary_pct": 1.0, "rope_parameters": None, "use_parallel_residual": False},
        {"rope.dimension_count": 16, "use_parallel_residual": False, "attention.head_count_kv": None},
        {},
    ),
    "phi2": (
        "phi2",
        "phi",
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "num_key_value_heads": 4},
        {"rope.dimension_count": 8},
        {},
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "use_qkv_bias": True},
        {"rope.dimension_count": 8, "use_parallel_residual": True},
        {},
    ),
    "stablelm-parallel": (
        "stablelm",
        "stablelm",
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}, "use_parallel_residual": True},
        {"use_parallel_residual": True},
        {},
    ),
    "command-r": ("command-r", "cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}, {}),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None}, {}, {}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that gives a model of `MODELS` as a Hugging Face folder and as a GGUF file."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            architecture, model_type, settings, extra, tables = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            write_checkpoint(folder / "hf", model_type, {"vocab_size": 260, "bos_token_id": None} | settings)
            model = AutoModelForCausalLM.from_pretrained(folder / "hf")
            write_gguf(folder / "model.gguf", model, architecture, extra=extra, tables=tables)
            made[name] = folder / "hf", folder / "model.gguf"
        return made[name]

    return get


def test_every_architecture_is_tried_and_can_be_exported() -> None:
    assert {architecture.model_type for architecture in ARCHITECTURES.values()} <= set(supported_model_types())
    assert {architecture for architecture, *_ in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_it_was_made_from(name: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    folder, path = pair(name)
    ours = GgufCheckpoint(path)
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model = ours.load_reference()
    for weight, parameter in expected.named_parameters():
        assert ours.shape(weight) == tuple(parameter.shape)
        # Gemma's norms are stored with 1 added, which rounds.
        tolerance = 1e-6 if MODELS[name][0].startswith("gemma") else 0
        np.testing.assert_allclose(ours.read(weight), parameter.detach().numpy(), rtol=0, atol=tolerance)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 260, (2, 100)))
    with torch.no_grad():
        logits = expected(ids).logits
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=2e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_graph_of_the_folder(
    name: str, pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    graphs = []
    for checkpoint in (SafetensorsCheckpoint(pair(name)[0]), GgufCheckpoint(pair(name)[1])):
        folder = tmp_path / type(checkpoint).__name__
        folder.mkdir()
        file = DecoderGraph(checkpoint, describe(checkpoint.config)).write(folder, lambda: None)["file"]
        graphs.append(onnx.load(folder / file).graph)
    expected, ours = graphs
    assert [node.SerializeToString() for node in ours.node] == [node.SerializeToString() for node in expected.node]
    for one, other in zip(ours.initializer, expected.initializer, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(to_array(one), to_array(other), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("phi3")])  # it ignores phi3's windows
def test_llama_cpp_computes_the_same(name: str, pair: Callable[[str], tuple[Path, Path]]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ids = np.random.default_rng(0).integers(3, 260, 60)
    theirs = llama_cpp.Llama(str(pair(name)[1]), n_ctx=512, n_batch=128, logits_all=True, verbose=False)
    theirs.eval(ids.tolist())
    with torch.no_grad():
        logits = GgufCheckpoint(pair(name)[1]).load_reference()(torch.from_numpy(ids[None])).logits[0].numpy()
    # Its cache holds float16.
    np.testing.assert_allclose(theirs.scores[: len(ids)], logits, atol=0.01 * np.abs(logits).max())


def test_a_quantized_file_is_exported_and_answers_like_its_weights(
    pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair("llama")[0], attn_implementation="eager").eval()
    path = write_gguf(tmp_path / "model.gguf", model, "llama", kind="Q8_0")
    bundle = export(str(path), tmp_path / "bundle")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                parameter.copy_(
                    torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind))
                )
        ids = np.random.default_rng(0).integers(3, 260, 30)
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    # Rows are permuted before they are quantized, blocks run along them: the order changes nothing.
    np.testing.assert_allclose(Engine(bundle).score(ids), expected, rtol=1e-4, atol=1e-4)
    assert Tokenizer.from_file(str(bundle.path / "tokenizer.json")).encode("a1</s>").tokens[-1] == "</s>"
    assert (bundle.path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((bundle.path / "generation_config.json").read_text()) == {"eos_token_id": [2]}
    assert json.loads((bundle.path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_unpacked_file_is_a_folder_with_the_same_weights(
    name: str, pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, path = pair(name)
    script = Path(__file__).parent.parent / "scripts" / "unpack_gguf.py"
    subprocess.run([sys.executable, script, path, tmp_path / "hf"], check=True)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert {key for key, _ in unpacked.named_parameters()} == {key for key, _ in expected.named_parameters()}
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 260, (2, 40)))
    with torch.no_grad():
        torch.testing.assert_close(unpacked(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    again = subprocess.run([sys.executable, script, path, tmp_path / "hf"], capture_output=True, text=True)
    assert again.returncode != 0  # nothing is written over


def _tiny(path: Path, extra: dict[str, Any], tables: dict[str, np.ndarray] | None = None, **settings: Any) -> Path:
    config = AutoConfig.for_model("llama", **(SIZES | {"vocab_size": 260, "num_hidden_layers": 1} | settings))
    return write_gguf(path, AutoModelForCausalLM.from_config(config), "llama", extra=extra, tables=tables)


@pytest.mark.parametrize(
    ("extra", "error", "reason"),
    [
        ({"attention.sliding_window": 512}, UnsupportedError, r"`llama\.attention\.sliding_window` = 512"),
        ({"expert_count": 8}, UnsupportedError, r"`llama\.expert_count` = 8"),
        ({"logit_scale": 2.0}, UnsupportedError, r"`llama\.logit_scale` = 2\.0"),
        ({"attention.causal": False}, UnsupportedError, "is an encoder"),
        ({"attention.value_length": 8}, UnsupportedError, "different lengths"),
        ({"attention.head_count_kv": [2, 4]}, UnsupportedError, "differs from layer to layer"),
        ({"rope.scaling.type": "ntk"}, UnsupportedError, "rotary scaling `ntk`"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, UnsupportedError, "extrapolation"),
        ({"rope.scaling.attn_factor": 1.5}, UnsupportedError, r"`rope\.scaling\.attn_factor` with none"),
        ({"rope.scaling.type": "longrope"}, InputError, "lacks the tables"),
        ({"block_count": None}, InputError, r"`llama\.block_count`.* is None"),
        ({"block_count": 2**31 - 1}, InputError, "more than it has tensors"),
        ({"block_count": "one"}, InputError, r"`llama\.block_count`.* is 'one', not a size"),
        ({"embedding_length": 0}, InputError, r"`llama\.embedding_length`.* is 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, InputError, "not a number"),
        ({"attention.layer_norm_rms_epsilon": None}, InputError, "layer_norm_rms_epsilon"),
    ],
)
def test_metadata_that_changes_the_model_is_read_or_refused(
    extra: dict[str, Any], error: type, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        GgufCheckpoint(_tiny(tmp_path / "model.gguf", extra))


def test_a_granite_without_rotary_positions_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("granite", **(SIZES | {"vocab_size": 260, "num_hidden_layers": 1}))
    model = AutoModelForCausalLM.from_config(config)
    path = write_gguf(tmp_path / "model.gguf", model, "granite", extra={"rope.scaling.finetuned": False})
    with pytest.raises(UnsupportedError, match="a granite without rotary positions"):
        GgufCheckpoint(path)


@pytest.mark.parametrize(("name", "factors"), [("llama3", None), ("phi3-longrope", "short")])
def test_only_longrope_has_factors_to_choose(
    name: str, factors: str | None, pair: Callable[[str], tuple[Path, Path]]
) -> None:
    assert describe(GgufCheckpoint(pair(name)[1]).config).rotary_factors == factors


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _tiny(tmp_path / "model.gguf", {})
    checkpoint = GgufCheckpoint(path)
    need = 4 * sum(parameter.numel() for parameter in checkpoint.load_reference().parameters())
    assert DecoderGraph(checkpoint, describe(checkpoint.config)).weights.num_bytes == need
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=need - 1))
    with pytest.raises(ResourceError, match="the bundle needs about"):
        export(str(path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_experts_that_are_none_are_no_reason_to_refuse(tmp_path: Path) -> None:
    GgufCheckpoint(_tiny(tmp_path / "model.gguf", {"expert_count": 0, "expert_used_count": 0}))


@pytest.mark.parametrize(
    ("table", "reason"),
    [([1.0, 2.0], "do not fit"), ([1.0] * 7 + [0.0], "not positive"), ([np.nan] * 8, "not positive")],
)
def test_rotary_tables_that_can_not_be_are_refused(table: list[float], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        GgufCheckpoint(_tiny(tmp_path / "model.gguf", {}, {"rope_freqs.weight": np.array(table, np.float32)}))


def test_a_tensor_that_no_model_uses_is_refused(tmp_path: Path) -> None:
    path = _tiny(tmp_path / "model.gguf", {}, {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(UnsupportedError, match=r"`blk\.0\.attn_sinks\.weight`"):
        GgufCheckpoint(path).load_reference()


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = _tiny(tmp_path / "model.gguf", {"feed_forward_length": 80})
    with pytest.raises(InputError, match=r"`model\.layers\.0\.mlp\.gate_proj\.weight`.*\[96, 64\].*\[80, 64\]"):
        GgufCheckpoint(path).load_reference()


def test_a_missing_weight_is_named(pair: Callable[[str], tuple[Path, Path]]) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(InputError, match=r"q_proj\.bias` \(`blk\.0\.attn_q\.bias`\) is missing from .*model\.gguf"):
        GgufCheckpoint(pair("llama-tied")[1]).read(name)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="260 tokens and embeddings for 200"):
        GgufCheckpoint(_tiny(tmp_path / "model.gguf", {}, vocab_size=200))


def test_a_vocabulary_without_weights_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add_tokenizer(writer)
    with pytest.raises(InputError, match=r"no weights in .*model\.gguf"):
        open_checkpoint(str(finish(writer, tmp_path / "model.gguf")))


def test_a_folder_with_a_file_in_it_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"no config\.json") as raised:
        open_checkpoint(str(tmp_path))
    assert str(tmp_path / "model.gguf") in (raised.value.hint or "")


@pytest.mark.parametrize(("architecture", "kind"), [("rwkv", None), ("", None), ("llama", "adapter")])
def test_other_things_in_gguf_are_named(architecture: str, kind: str | None, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    if kind:
        writer.add_type(kind)
    add_tokenizer(writer)
    with pytest.raises(UnsupportedError, match=f"`{kind or architecture}`"):
        open_checkpoint(str(finish(writer, tmp_path / "model.gguf")))
