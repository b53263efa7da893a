"""The training loop: steps as PyTorch takes them, mixed precision, resuming, and the ways a run may end."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, InputError, OptionError, OutputExistsError, ResourceError, UnsupportedError
from llmfast.export.stage import export
from llmfast.tokenizer import Tokenizer
from llmfast.tune import loop, precision
from llmfast.tune.optimizers import learning_rate_at
from llmfast.tune.options import TuneOptions
from llmfast.tune.rows import epoch_batches
from llmfast.tune.snapshots import Snapshots
from llmfast.tune.stage import describe_tuning
from tests.tiny_tune import TEXT, losses, run, same, weights, write_encoder, write_labelled, write_text

LENGTH = 32


@pytest.fixture(scope="session")
def decoder(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama-tied")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def _reference(
    decoder: Path, steps: int, batch_size: int, **settings: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train as one would by hand, with AdamW of PyTorch; return weights and losses."""
    ids = [*Tokenizer.load(decoder).encode(TEXT), 2]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).train()
    matrices = [one for one in model.parameters() if one.ndim > 1]
    vectors = [one for one in model.parameters() if one.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}])
    options = TuneOptions(Path())
    order = epoch_batches(np.full(len(windows), LENGTH), batch_size, 0, 0)
    found = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, options, 1e-3)
        batch = windows[order[step]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return dict(model.state_dict()), found


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tune(decoder: Path, output: Path, text: Path, **options: object):
    settings = {"seq_len": LENGTH, "batch_size": 8, "max_steps": 6, "learning_rate": 1e-3, "validation_split": 0}
    return run(decoder, output, text, **settings | options)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_are_those_of_a_loop_by_hand(decoder: Path, text: Path, tmp_path: Path, accumulate: int) -> None:
    _tune(decoder, tmp_path / "out", text, accumulate=accumulate)
    wanted, wanted_losses = _reference(decoder, 6, 8)
    found = weights(tmp_path / "out")
    np.testing.assert_allclose(losses(tmp_path / "out"), wanted_losses, rtol=1e-5)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-4, atol=2e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(decoder: Path, text: Path, tmp_path: Path) -> None:
    _tune(decoder, tmp_path / "plain", text, max_steps=2)
    _tune(decoder, tmp_path / "twice", text, max_steps=2, gradient_checkpointing=True)
    left, right = weights(tmp_path / "plain"), weights(tmp_path / "twice")
    assert all(torch.allclose(left[name], right[name], atol=1e-7) for name in left)
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["model_type"] == "llama"


def test_bf16_reaches_the_loss_of_fp32_within_one_per_cent(decoder: Path, text: Path, tmp_path: Path) -> None:
    final = {}
    for name in ("fp32", "bf16"):
        tuned = _tune(decoder, tmp_path / name, text, precision=name, max_steps=30, validation_split=0.2)
        final[name] = tuned.figures["validations"][-1]["validation_loss"]
        assert final[name] < 0.8 * tuned.figures["validations"][0]["validation_loss"]
    assert abs(final["bf16"] / final["fp32"] - 1) < 0.01


def test_weights_gradients_and_moments_stay_float32_in_bf16(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    computed: set[torch.dtype] = set()
    step = precision.Precision.step

    def watched(self: precision.Precision, optimizer: torch.optim.Optimizer) -> bool:
        taken = step(self, optimizer)
        for group in optimizer.param_groups:
            for one in group["params"]:
                seen.update({one.dtype, one.grad.dtype, optimizer.state[one]["exp_avg"].dtype})
        return taken

    monkeypatch.setattr(precision.Precision, "step", watched)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, result: computed.add(result.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    with hook:
        _tune(decoder, tmp_path / "out", text, precision="bf16", max_steps=2)
    assert seen == {torch.float32}
    assert computed == {torch.bfloat16}


def test_fp16_skips_a_step_that_overflows_and_halves_the_scale() -> None:
    layer = torch.nn.Linear(4, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mixed = precision.Precision("fp16", torch.device("cpu"))
    first = mixed.scale
    for value, taken in ((3e4, False), (0.1, True)):  # the scaled gradient of the first is beyond float16
        with mixed.autocast():
            loss = layer(torch.full((1, 4), value)).float().sum()
        mixed.backward(loss)
        mixed.unscale(optimizer)
        assert mixed.step(optimizer) is taken
        optimizer.zero_grad()
        if not taken:
            assert torch.equal(layer.weight, before)
            assert mixed.scale == first / 2
    assert mixed.skipped == 1
    assert not torch.equal(layer.weight, before)
    assert layer.weight.dtype == torch.float32


def test_fp16_trains_and_its_scale_is_logged(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True, raising=False)
    _tune(decoder, tmp_path / "out", text, precision="fp16", max_steps=8)
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert all(line["loss_scale"] >= 1 for line in lines)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_fp16_on_a_cpu_without_it_says_what_to_use(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False, raising=False)
    with pytest.raises(UnsupportedError, match="does not multiply float16") as caught:
        _tune(decoder, tmp_path / "out", text, precision="fp16")
    assert "--precision bf16" in caught.value.hint or "--precision fp32" in caught.value.hint


class _Stop(Exception):
    pass


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a run break down in the middle of a step."""
    take = loop.Trainer._step

    def breaking(self: loop.Trainer, rows: object):
        if self.progress.step == steps:
            raise _Stop
        return take(self, rows)

    monkeypatch.setattr(loop.Trainer, "_step", breaking)


RESUMED = {
    "adamw": {},
    "bf16, two epochs, dropout": {"precision": "bf16"},
    "sgd, linear, accumulated": {"optimizer": "sgd", "schedule": "linear", "accumulate": 2},
    "adapters": {"lora": 4},
    "rounded": {"quantize_aware": "int4:block_size=16"},
    "early stopping": {"patience": 5, "evaluate_every": 2},
    "averaged, answered twice": {"average": 0.8, "settings": {"consistency": "2"}},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    source = write_encoder(tmp_path / "bert", hidden_dropout_prob=0.2)
    data = write_labelled(tmp_path / "data.txt")
    settings = {"batch_size": 8, "epochs": 2, "save_every": 3, "learning_rate": 1e-2} | options
    whole = run(source, tmp_path / "whole", data, **settings)
    with monkeypatch.context() as patched, pytest.raises(_Stop):
        _stop_after(patched, 8)
        run(source, tmp_path / "parts", data, **settings)
    left = sorted(path.name for path in (tmp_path / ".parts.tune-resume").iterdir())
    assert left == ["run.json", "step-00000006.pt", "training.jsonl"]
    torch.manual_seed(123)  # nothing may depend on what was random before
    resumed = run(source, tmp_path / "parts", data, **settings, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert whole.figures["validations"] == resumed.figures["validations"]
    assert not (tmp_path / ".parts.tune-resume").exists()


def test_a_run_is_not_resumed_with_other_options_or_data(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        _tune(decoder, tmp_path / "out", text, resume=True)
    with monkeypatch.context() as patched, pytest.raises(_Stop):
        _stop_after(patched, 3)
        _tune(decoder, tmp_path / "out", text, save_every=2)
    with pytest.raises(OutputExistsError, match="step 2"):
        _tune(decoder, tmp_path / "out", text)
    with pytest.raises(InputError, match=r"learning_rate was 0\.001, is 0\.01") as caught:
        _tune(decoder, tmp_path / "out", text, resume=True, learning_rate=1e-2)
    assert caught.value.exit_code == 3
    text.write_text(TEXT + "more", encoding="utf-8")
    with pytest.raises(InputError, match="data was"):
        _tune(decoder, tmp_path / "out", text, resume=True)
    _tune(decoder, tmp_path / "out", text, overwrite=True, max_steps=1)
    assert len(losses(tmp_path / "out")) == 1


def test_ctrl_c_saves_what_a_resumed_run_goes_on_with(decoder: Path, text: Path, tmp_path: Path) -> None:
    _tune(decoder, tmp_path / "whole", text, max_steps=40)
    threading.Thread(target=_interrupt_when, args=(tmp_path / ".out.tune-resume" / "training.jsonl",)).start()
    with pytest.raises(KeyboardInterrupt):
        _tune(decoder, tmp_path / "out", text, max_steps=40)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "out").exists()
    _tune(decoder, tmp_path / "out", text, max_steps=40, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def _interrupt_when(log: Path) -> None:
    for _ in range(3000):
        if log.is_file() and log.read_text(encoding="utf-8").count("\n") >= 3:
            break
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    decoder: Path, text: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(GateError, match=r"is not a number at step \d+ of 50") as caught:
        _tune(decoder, tmp_path / "out", text, max_steps=50, learning_rate=10.0, optimizer="sgd", max_grad_norm=0,
              schedule="constant", warmup=0.0, precision=name)  # fmt: skip
    assert "--lr" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tune-resume").exists()


def test_a_full_disk_leaves_the_last_checkpoint(decoder: Path, text: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    program = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from llmfast.tune import loop
from tests.test_tune import _tune
save = loop.Trainer._save
def limited(self):
    if self.progress.step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    save(self)
loop.Trainer._save = limited
from llmfast.errors import ResourceError
try:
    _tune(Path({str(decoder)!r}), Path({str(tmp_path / "out")!r}), Path({str(text)!r}), save_every=2)
except ResourceError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 6, result.stderr
    assert "the checkpoint of step 2 is intact" in result.stdout
    left = sorted(path.name for path in (tmp_path / ".out.tune-resume").iterdir())
    assert left == ["run.json", "step-00000002.pt", "training.jsonl"]
    _tune(decoder, tmp_path / "out", text, save_every=2, resume=True)
    _tune(decoder, tmp_path / "whole", text)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "out", {}, resume=False, overwrite=False)
    snapshots.begin()
    snapshots.write(1, {"value": torch.ones(3)})
    with pytest.raises(ResourceError, match="step 1 is intact"):
        snapshots.write(2, {"value": _Unwritable()})
    assert torch.equal(snapshots.read()["value"], torch.ones(3))
    assert not list(snapshots.folder.glob("*.part"))


class _Unwritable:
    def __reduce__(self) -> tuple[object, ...]:
        raise OSError(28, "No space left on device")


def test_early_stopping_keeps_the_best_weights(decoder: Path, text: Path, tmp_path: Path) -> None:
    tuned = _tune(decoder, tmp_path / "out", text, max_steps=60, evaluate_every=2, patience=2, learning_rate=1.0,
                  validation_split=0.2)  # fmt: skip
    validations = tuned.figures["validations"]
    best = min(validations, key=lambda line: line["validation_loss"])
    assert tuned.figures["steps"] == best["step"] + 4 < 60
    again = run(tmp_path / "out", tmp_path / "again", text, max_steps=1, validation_split=0.2, seq_len=LENGTH)
    assert again.figures["validations"][0]["validation_loss"] == pytest.approx(best["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("patience", [None, 10])
def test_the_average_of_the_weights_is_validated_and_kept(
    decoder: Path, text: Path, tmp_path: Path, patience: int | None
) -> None:
    seen = []
    take = loop.Trainer._step

    def watching(self: loop.Trainer, rows: object):
        taken = take(self, rows)
        seen.append([one.detach().double().numpy().copy() for one in self._trained])
        return taken

    start = [one.detach().double().numpy() for one in _load(decoder).parameters()]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Trainer, "_step", watching)
        tuned = _tune(decoder, tmp_path / "out", text, validation=text, average=0.5, max_steps=9, patience=patience)
    for step, values in enumerate(seen, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        start = [decay * mean + (1 - decay) * value for mean, value in zip(start, values, strict=True)]
    kept = [one.detach().numpy() for one in _load(tmp_path / "out").parameters()]
    for mean, value in zip(start, kept, strict=True):
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-7)
    again = _tune(tmp_path / "out", tmp_path / "again", text, validation=text, max_steps=1)
    assert again.figures["validations"][0]["validation_loss"] == tuned.figures["validations"][-1]["validation_loss"]


def test_adapters_train_little_and_are_merged(decoder: Path, text: Path, tmp_path: Path) -> None:
    tuned = _tune(decoder, tmp_path / "out", text, lora=4, learning_rate=1e-2, max_steps=10)
    assert tuned.figures["trained_parameters"] < 0.2 * tuned.figures["parameters"]
    before, after = weights(decoder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 4
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_the_output_exports_and_says_what_was_done(decoder: Path, text: Path, tmp_path: Path) -> None:
    _tune(decoder, tmp_path / "once", text, max_steps=1)
    _tune(tmp_path / "once", tmp_path / "twice", text, max_steps=2, seed=7)
    steps = export(str(tmp_path / "twice"), tmp_path / "fp32").manifest.lineage
    assert [step.stage for step in steps] == ["tune", "tune", "export"]
    assert steps[1].method == "causal-lm"
    assert steps[1].seed == 7
    assert steps[1].options["steps"] == 2
    assert str(tmp_path) not in json.dumps([step.options for step in steps])
    assert [step.stage for step in ModelBundle.open(tmp_path / "fp32").manifest.lineage] == ["tune", "tune", "export"]
    assert (tmp_path / "twice" / "curves.svg").read_text(encoding="utf-8").count("<svg") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision `fp8`"),
        ({"optimizer": "lion"}, "optimizer `lion`"),
        ({"batch_size": 0}, "batch-size 0"),
        ({"learning_rate": -1.0}, "lr -1"),
        ({"lora": 4, "quantize_aware": "int4"}, "does not go with --lora"),
        ({"quantize_aware": "fp16"}, "rounds each value by itself"),
        ({"quantize_aware": "int4:block_size=48"}, "block_size 48"),
        ({"quantize_aware": "int9"}, "unknown scheme `int9`"),
        ({"quantize_aware": "int8:granularity=tensor"}, "dynamic scale per token only"),
        ({"parallel": "fsdp"}, "needs several processes"),
        ({"accumulate": 9}, "a step has 8 rows only"),
        ({"patience": 2}, "needs a validation"),
        ({"objective": "causal_ml"}, "unknown objective"),
        ({"settings": {"depth": "3"}}, "has no option `depth`"),
    ],
)
def test_options_that_cannot_be_are_refused(
    decoder: Path, text: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        _tune(decoder, tmp_path / "out", text, **options)
    settings = {"batch_size": 8, "validation_split": 0, "device": "cpu"} | options
    with pytest.raises(OptionError, match=message):
        describe_tuning(str(decoder), tmp_path / "out", TuneOptions(text, **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_not_cleared_again() -> None:
    program = (
        "import resource, sys\n"
        "from llmfast.tune.allocator import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "b'x' * (64 << 20); before = faults(); b'x' * (64 << 20); print(faults() - before)"
    )
    found = [
        int(subprocess.run([sys.executable, "-c", program, word], capture_output=True, check=True).stdout)
        for word in ("keep", "leave")
    ]
    pages = (64 << 20) // os.sysconf("SC_PAGESIZE")
    assert found[0] < 0.01 * pages
    assert found[1] > 0.5 * pages
