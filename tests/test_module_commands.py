"""`export --module` on the command line: tasks, mistakes, dry runs and interrupts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmfast.bundle import ModelBundle
from tests.tiny_module import run_cli, write


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_task_gives_the_bundle_to_the_commands_that_know_it(tmp_path: Path) -> None:
    code = """
        print("a line that must not reach stdout")

        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.head = nn.Embedding(300, 16), nn.Linear(16, 3)

            def forward(self, input_ids, attention_mask):
                print("another one")
                mask = attention_mask[..., None].float()
                return {"logits": self.head((self.table(input_ids) * mask).sum(1) / mask.sum(1))}

        def factory():
            ids = torch.arange(12).reshape(2, 6)
            axes = {0: "batch", 1: torch.export.Dim("length", max=64)}
            return Classifier(), (ids, torch.ones_like(ids)), {"input_ids": axes, "attention_mask": axes}
    """
    file, output = write(tmp_path, code), tmp_path / "out"
    result = run_cli("export", "--module", f"{file}:factory", "-o", output, "--task", "text-classification")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    architecture = ModelBundle.open(output).manifest.architecture
    assert (architecture["vocab_size"], architecture["context_length"]) == (300, 64)
    result = run_cli("bench", output, "--shapes", "2x5", "--rounds", 1, "--warmup", 0, "--format", "json")
    assert json.loads(result.stdout)["rows"][0]["latency_s_2x5"] > 0
    result = run_cli("export", "--module", f"{file}:factory", "-o", tmp_path / "x", "--task", "feature-extraction")
    assert result.exit_code == 5
    assert "no output `last_hidden_state`" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "one of them"),
        (["somewhere", "--module", "own.py:factory"], 2, "one of them"),
        (["somewhere", "--weights", "w.safetensors"], 2, "--weights belongs to --module"),
        (["--module", "own.py"], 2, "not FILE.py:FUNCTION"),
        (["--module", "{tmp}/none.py:factory"], 3, "not found"),
        (["--module", "{tmp}/none.py:factory", "--dry-run"], 3, "not found"),
        (["--module", "{tmp}/own.py:factory", "--task", "text-generaton"], 2, "did you mean `text-generation`"),
        (["--module", "{tmp}/own.py:factori"], 3, "did you mean `factory`"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    write(tmp_path, "def factory():\n    return 1")
    result = run_cli("export", *[part.format(tmp=tmp_path) for part in arguments], "-o", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "__pycache__") == ["own.py"]


def test_dry_run_does_not_run_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "raise SystemExit")
    result = run_cli("export", "--module", f"{file}:factory", "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"would run `{file}`")


def test_interrupt_ends_the_users_code_too(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    file = write(
        tmp_path,
        f"""
        def factory():
            import os, pathlib, time
            pathlib.Path({str(begun)!r}).write_text(str(os.getpid()))
            time.sleep(300)
        """,
    )
    command = [sys.executable, "-m", "llmfast", "export", "--module", f"{file}:factory", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (begun.exists() and begun.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    assert not os.path.exists(f"/proc/{begun.read_text()}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["begun", "own.py"]
