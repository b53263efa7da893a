"""The comparison with other engines: PyTorch and llmfast take part here; the other peers tell why they do not."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).parent.parent / "scripts"

# A contestant without a model: its logits are those of the seed that it is given, plus its share of another's.
FAKE = """
import sys
import numpy as np
from peers.protocol import serve

SEED, SHARE, FLAW = int(sys.argv.pop(1)), float(sys.argv.pop(1)), sys.argv.pop(1)


class Model:
    def __init__(self, folder, form, threads, context):
        self.tokens = 0

    def generate(self, ids, count, emit):
        if FLAW == "dies":
            sys.exit("no more")
        for _ in range(count):
            emit(7)

    def score(self, ids):
        if FLAW == "refuses":
            raise RuntimeError("first line\\nno logits here")
        if FLAW == "dies":
            sys.exit("no more")
        def draw(seed):
            return np.random.default_rng([seed, *ids]).normal(0, 3, (len(ids), 3000))
        logits = draw(SEED) + SHARE * draw(99)
        if FLAW == "log probabilities":
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return {"narrow": logits[:, :-1], "unsound": logits * np.nan}.get(FLAW, logits)


serve(("numpy",), None, Model)
"""


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
    lengths += ["--batch", "3", "--batch-lengths", "2", "9"]
    places = ["--work", tmp_path / "work", "--json", tmp_path / "figures.json"]
    done = compare("--checkpoint", checkpoint, "--ours", fp32_bundle, *arguments, *lengths, *places)
    assert done.returncode == 0, done.stderr

    document = json.loads((tmp_path / "figures.json").read_text())
    contestants = {one["name"]: one for one in document["contestants"]}
    single = ["prompt 8", "prompt 20", "decode 4 after 0", "decode 4 after 6"]
    # PyTorch's script answers one prompt at a time.
    for name, workloads in {"torch_eager fp32": single, f"llmfast {fp32_bundle.name}": [*single, "3 prompts"]}.items():
        speeds = contestants[name]["speeds"]
        assert list(speeds) == workloads
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


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a script's module, as the scripts do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return lambda name: importlib.import_module(f"peers.{name}")


@pytest.fixture
def fake(peers: Callable[[str], ModuleType], tmp_path: Path) -> Any:
    """Yield a function that opens a contestant whose script is `FAKE`."""
    opened = []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(2_000_000))

    def enter(name: str, share: float = 0.0, flaw: str = "none", seed: int = 1) -> Any:
        command = [sys.executable, "-c", FAKE, str(seed), str(share), flaw, "--format", "fp32", "--threads", "1"]
        command += ["--context", "64", "--model", str(tmp_path / "model")]
        one = peers("contestant").Contestant(name, command, tmp_path / f"{name}.log")
        one.open(threads=1)
        opened.append(one)
        return one

    yield enter
    for one in opened:
        one.close()


def reference_figures(reference: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Return KL(reference || logits) in nats and agreement, means over all rows but the last, in float64."""

    def log_softmax(values: np.ndarray) -> np.ndarray:
        return values - np.logaddexp.reduce(values, axis=1, keepdims=True)

    p, q = (log_softmax(values[:-1].astype(np.float64)) for values in (reference, logits))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean()), float((p.argmax(1) == q.argmax(1)).mean())


def test_quality_is_the_divergence_from_the_reference(
    peers: Callable[[str], ModuleType], fake: Callable[..., Any]
) -> None:
    reference, near, far = fake("reference"), fake("near", 0.02), fake("far", 0.5, "log probabilities")
    windows = [np.arange(start, start + 50) for start in (0, 300)]
    notes: list[str] = []
    peers("quality").measure_quality([near, reference, far], reference, windows, notes.append)
    assert len(notes) == 2

    def logits(share: float, window: np.ndarray) -> np.ndarray:
        drawn = [np.random.default_rng([seed, *window]).normal(0, 3, (50, 3000)) for seed in (1, 99)]
        return drawn[0] + share * drawn[1]

    for one, share in ((near, 0.02), (far, 0.5)):
        figures = [reference_figures(logits(0, window), logits(share, window)) for window in windows]
        kld, agreement = np.mean(figures, axis=0)
        assert one.quality["kld"] == pytest.approx(kld, rel=1e-4)
        assert one.quality["top1_agreement"] == pytest.approx(agreement)
    assert near.quality["kld"] < far.quality["kld"] / 10
    assert (reference.quality["kld"], reference.quality["top1_agreement"]) == (0.0, 1.0)


def test_a_contestant_without_logits_says_why_and_the_others_go_on(
    peers: Callable[[str], ModuleType], fake: Callable[..., Any]
) -> None:
    reference = fake("reference")
    flaws = {flaw: fake(flaw, 0.1, flaw) for flaw in ("refuses", "narrow", "unsound", "dies", "none")}
    windows = [np.arange(20), np.arange(20, 40)]
    peers("quality").measure_quality(list(flaws.values()), reference, windows, print)
    assert flaws["refuses"].unscored == "no logits here"
    assert flaws["narrow"].unscored == "its logits are [20, 2999], the checkpoint's [20, 3000]"
    assert flaws["unsound"].unscored == "its divergence is not a finite number"
    assert flaws["dies"].failure.startswith("no more (")
    assert all(not one.quality for flaw, one in flaws.items() if flaw != "none")
    assert flaws["none"].quality["kld"] > 0

    compare = peers("compare")
    workload = peers("contestant").Workload("decode 2 after 1", 1, 2)
    for one in flaws.values():
        if one.failure is None:  # what has no quality still has a speed
            one.run(workload, {"ids": [1], "tokens": 3}, is_warmup=False)
    data = {"file": "text.txt", "windows": 2, "window_length": 20}
    lines = compare.render(list(flaws.values()), [workload], {"cores": 2}, 1, data).splitlines()
    assert "quality on 2 x 20 tokens of text.txt" in lines[0]
    cells = {line.split(" | ")[0][2:]: [cell.strip(" |") for cell in line.split(" | ")[1:]] for line in lines[2:]}
    assert cells["tokens/s"] == ["KLD", "top-1 %", "MB", "decode 2 after 1", "versions"]
    assert cells["refuses"][:3] == ["-", "-", "2"]
    assert float(cells["refuses"][3]) > 0
    assert cells["refuses"][4] == f"numpy {np.__version__}; no quality: no logits here"
    assert cells["dies"][0] == "-"
    assert cells["dies"][4].startswith("failed: no more")
    assert cells["none"][0] == f"{flaws['none'].quality['kld']:.4f}"


def test_without_a_reference_nobody_has_quality(peers: Callable[[str], ModuleType], fake: Callable[..., Any]) -> None:
    reference, one = fake("reference", flaw="dies"), fake("one")
    peers("quality").measure_quality([one], reference, [np.arange(20)], print)
    assert one.unscored.startswith("nothing to compare with: reference: no more")
    assert not one.quality


def test_the_fastest_of_those_as_close_is_named(peers: Callable[[str], ModuleType]) -> None:
    contestant = peers("contestant").Contestant

    def make(name: str, kld: float | None, speed: float, ours: bool = False) -> Any:
        quality = {} if kld is None else {"kld": kld, "top1_agreement": 0.9}
        return contestant(
            name, [], Path("log"), ours, hello={"bytes": 1e6}, speeds={"prompt 8": [speed]}, quality=quality
        )

    peer = [make("close", 0.01, 50), make("far", 0.2, 400), make("unknown", None, 200)]
    bundle = make("int8", 0.01, 100, ours=True)
    workload = peers("contestant").Workload("prompt 8", 8, 0)
    data = {"file": "text.txt", "windows": 1, "window_length": 2}
    table = peers("compare").render([*peer, bundle], [workload], {}, 1, data)
    assert "| **the fastest** | **0.25** |" in table
    assert "| **the fastest of no larger KLD** | **2.00** |" in table
    assert "no larger KLD" not in peers("compare").render([*peer[1:], bundle], [workload], {}, 1, data)


def test_scripts_score_as_the_checkpoint_does(checkpoint: Path, fp32_bundle: Path, tmp_path: Path) -> None:
    ids = list(range(3, 23))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    for name, folder in {"torch_eager": tmp_path / "model", "llmfast_bundle": fp32_bundle}.items():
        file = tmp_path / f"{name}.npy"
        requests = [{"ids": [5, 6], "tokens": 2}, {"ids": ids, "logits": str(file)}]
        replies = converse(name, folder, checkpoint, requests)[1:]
        assert replies[1] == {}
        logits = np.load(file)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, wanted, atol=1e-4)


def test_quality_stands_beside_speed(checkpoint: Path, fp32_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    lengths = ["--prompt", "8", "--decode", "2", "--after", "6", "--rounds", "1", "--threads", "1"]
    places = ["--work", tmp_path / "work", "--json", tmp_path / "figures.json"]
    quality = ["--data", text, "--windows", "2", "--window-length", "24"]
    # PyTorch takes part as the reference alone.
    peers = ["--only", "ctranslate2", "--peer", f"torch_eager={sys.executable}"]
    done = compare("--checkpoint", checkpoint, "--ours", fp32_bundle, *peers, *lengths, *places, *quality)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "figures.json").read_text())
    assert document["data"] == {"file": "text.txt", "windows": 2, "window_length": 24}
    failed, ours = document["contestants"]
    assert failed["quality"] is None
    assert 0 <= ours["quality"]["kld"] < 1e-5
    assert ours["quality"]["top1_agreement"] == 1.0
    assert ours["speeds"]["prompt 8"]
    assert f"| llmfast {fp32_bundle.name} | 0.0000 | 100.0 | " in done.stdout
    assert not list((tmp_path / "work").rglob("*.npy"))


def converse(name: str, model: Path, checkpoint: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a script says to some requests, its greeting first."""
    options = ["--checkpoint", checkpoint, "--model", model, "--format", "fp32", "--threads", "1", "--context", "32"]
    done = subprocess.run(
        [sys.executable, "-m", f"peers.{name}", *options],
        cwd=SCRIPTS,
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_scripts_generate_the_same_tokens_and_forget_the_prompt_before(
    checkpoint: Path, fp32_bundle: Path, tmp_path: Path
) -> None:
    requests = [{"ids": ids, "tokens": 6} for ids in ([5, 9, 3, 14], [7], [5, 9, 3, 14])]
    answers = []
    for name, model in {"torch_eager": tmp_path / "model", "llmfast_bundle": fp32_bundle}.items():
        hello, *replies = converse(name, model, checkpoint, requests)
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
        (["--batch", "-1"], "--batch must not be negative"),
        (["--batch-lengths", "9", "3"], "the shortest prompt and the longest"),
        (["--windows", "0"], "at least 1"),
        (["--window-length", "1"], "at least 2"),
        (["--data", "absent"], "absent does not exist"),
    ],
)
def test_wrong_arguments(checkpoint: Path, arguments: list[str], reason: str) -> None:
    done = compare("--checkpoint", checkpoint, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr


def test_too_little_text(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short")
    done = compare("--checkpoint", checkpoint, "--data", tmp_path / "text.txt")
    assert done.returncode == 3
    assert "text too short" in done.stderr


def test_quality_needs_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    data = ["--data", tmp_path / "text.txt", "--window-length", "24", "--work", tmp_path / "work"]
    done = compare("--checkpoint", checkpoint, "--only", "ctranslate2", *data)
    assert done.returncode == 2
    assert "torch_eager to compare with: not installed: give --install" in done.stderr


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    done = compare("--checkpoint", tmp_path)
    assert done.returncode == 2
    assert "config.json" in done.stderr
