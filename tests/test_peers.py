"""The comparison with other engines: PyTorch and llmfast take part here; the other peers tell why they do not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "peers" / "compare.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama-tied")


def test_peers_and_bundles_take_turns_and_failures_are_told(
    checkpoint: Path, fp32_bundle: Path, tmp_path: Path
) -> None:
    arguments = ["--only", "torch_eager", "openvino_genai", "ctranslate2", "onnxruntime_genai", "llama_cpp"]
    for name, python in {
        "torch_eager": sys.executable,
        "openvino_genai": "/bin/false",
        "ctranslate2": "/no/python",
        "llama_cpp": sys.executable,
    }.items():
        arguments += ["--peer", f"{name}={python}"]
    lengths = ["--prompt", "8", "20", "--decode", "4", "--after", "6", "--rounds", "2", "--threads", "1"]
    places = ["--work", tmp_path / "work", "--json", tmp_path / "figures.json"]
    done = compare("--checkpoint", checkpoint, "--ours", fp32_bundle, *arguments, *lengths, *places)
    assert done.returncode == 0, done.stderr

    document = json.loads((tmp_path / "figures.json").read_text())
    contestants = {one["name"]: one for one in document["contestants"]}
    for name in ("torch_eager fp32", f"llmfast {fp32_bundle.name}"):
        speeds = contestants[name]["speeds"]
        assert list(speeds) == ["prompt 8", "prompt 20", "decode 4 after 0", "decode 4 after 6"]
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in speeds.values())
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert contestants["torch_eager fp32"]["bytes"] >= weights
    assert contestants["openvino_genai int8"]["failure"].startswith("ended with 1")
    assert "`/no/python` does not exist" in contestants["ctranslate2 int8"]["failure"]
    assert "--install" in contestants["onnxruntime_genai int4"]["failure"]
    assert "--gguf" in contestants["llama_cpp Q4_0"]["failure"]

    lines = done.stdout.splitlines()
    assert any(line.startswith("| ctranslate2 int8 |  |") and "does not exist" in line for line in lines)
    (times,) = (line for line in lines if line.startswith("| torch_eager fp32 | ") and "torch 2" not in line)
    (most,) = (line for line in lines if line.startswith("| **the fastest** |"))
    # PyTorch is the only peer that ran, so it is the fastest one.
    assert most.replace("*", "").split("|")[2:] == times.split("|")[2:]


def test_scripts_generate_the_same_tokens_and_forget_the_prompt_before(
    checkpoint: Path, fp32_bundle: Path, tmp_path: Path
) -> None:
    requests = [{"ids": ids, "tokens": 6} for ids in ([5, 9, 3, 14], [7], [5, 9, 3, 14])]
    answers = []
    for name, model in {"torch_eager": tmp_path / "model", "llmfast_bundle": fp32_bundle}.items():
        options = [
            "--checkpoint",
            checkpoint,
            "--model",
            model,
            "--format",
            "fp32",
            "--threads",
            "1",
            "--context",
            "32",
        ]
        done = subprocess.run(
            [sys.executable, "-m", f"peers.{name}", *options],
            cwd=SCRIPTS,
            input="".join(json.dumps(request) + "\n" for request in requests),
            capture_output=True,
            text=True,
            timeout=120,
        )
        hello, *replies = map(json.loads, done.stdout.splitlines())
        assert hello["versions"]
        assert all(len(reply["seconds"]) == 6 for reply in replies)
        answers.append([reply["tokens"] for reply in replies])
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2]
    assert answers[0][0] != answers[0][1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--peer", "vllm=python"], "the peers are"),
        (["--ours", "absent"], "absent does not exist"),
        (["--rounds", "0"], "at least 1"),
        (["--prompt", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(checkpoint: Path, arguments: list[str], reason: str) -> None:
    done = compare("--checkpoint", checkpoint, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    done = compare("--checkpoint", tmp_path)
    assert done.returncode == 2
    assert "config.json" in done.stderr
