"""Training on several processes gives what one process with the same batches gives."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_tune import losses, run, same, weights, write_encoder, write_labelled, write_text

ROOT = Path(__file__).parent.parent


def _launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `llmfast tune` in two processes, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Another way to the network than the loopback may be closed where tests run.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m"]
    return subprocess.run(
        [*command, "llmfast", "tune", *arguments, "--threads", "1", "--device", "cpu", "--log-every", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-5) for name in left
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(checkpoints: Callable[[str], Path], tmp_path: Path, mode: str) -> None:
    """Batches of 7 rows: shares are unequal, and in two passes; validation has an odd number of batches."""
    source, text = checkpoints("llama-tied"), write_text(tmp_path)
    options = {"seq_len": 32, "batch_size": 7, "max_steps": 6, "learning_rate": 1e-3, "accumulate": 2}
    alone = run(source, tmp_path / "one", text, **options, optimizer="sgd")
    spelled = ["--seq-len=32", "--batch-size=7", "--max-steps=6", "--lr=1e-3", "--accumulate=2", "--optimizer=sgd"]
    result = _launch(
        [
            str(source),
            "-o",
            str(tmp_path / "two"),
            "--data",
            str(text),
            *spelled,
            "--parallel",
            mode,
            "--precision=fp32",
        ]
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("validation loss") == 1  # one process prints
    assert _close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(source), weights(tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()
    assert alone.figures["validations"][-1]["validation_loss"] > 0
    assert not list(tmp_path.glob(".two*"))


def test_processes_fail_together(tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "bert")
    data = write_labelled(tmp_path / "data.txt", rows=8)
    result = _launch([str(source), "-o", str(tmp_path / "out"), "--data", str(data), "--batch-size", "1"])
    assert result.returncode != 0
    assert "fewer rows than the 2 processes" in result.stderr
    assert not (tmp_path / "out").exists()
