"""Rows D that need more than one process: signals, crashes, memory, two runs at once, a closed network."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmfast.runtime import usable_cores
from llmfast.verify import hash_files
from tests import tiny_decoder
from tests.tiny_encoder import save_encoder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the supervisor needs fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.write_bundle(tmp_path_factory.mktemp("model"))


def _quantize(model: Path, output: Path) -> list[str]:
    return ["quantize", str(model), "-o", str(output), "--scheme", "int8", "--no-measure"]


# Does something to the program, then runs it.
_PROGRAM = """
import os, signal, sys, time
import llmfast.graph.weights as weights
from llmfast.cli import main
save = weights.WeightFile.save
def do(*arguments):
    {action}
    return save(*arguments)
weights.WeightFile.save = do
main()
"""


_HERE = "print('here', file=sys.stderr, flush=True)"


def _start(action: str, arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM.format(action=action), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests themselves may run with `&`
        **options,
    )


_CRASHES = [
    ("os.kill(os.getpid(), signal.SIGSEGV)", 9, "SIGSEGV"),
    ("os.abort()", 9, "SIGABRT"),
    ("os.kill(os.getpid(), signal.SIGFPE)", 9, "SIGFPE"),
    ("os.kill(os.getpid(), signal.SIGILL)", 9, "SIGILL"),
    ("os.kill(os.getpid(), signal.SIGBUS)", 9, "SIGBUS"),
    ("import ctypes; ctypes.string_at(1)", 9, "SIGSEGV"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 6, "ran out of memory"),
]


@pytest.mark.parametrize(
    ("action", "code", "words"), _CRASHES, ids=[words for _, _, words in _CRASHES[:5]] + ["real", "oom"]
)
def test_a_crash_in_native_code_is_told_and_leaves_nothing(
    action: str, code: int, words: str, model: Path, tmp_path: Path
) -> None:
    """Rows D7 and D8: the kernel's way to end a process for want of memory is SIGKILL."""
    process = _start(action, _quantize(model, tmp_path / "output"))
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert words in errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_crash_names_the_file_that_was_open(model: Path) -> None:
    program = (
        "import os, signal\n"
        "import llmfast.infer.engine as engine\n"
        "from llmfast.cli import main\n"
        "engine.Engine.prefill = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "infer", str(model), "-p", "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 9
    assert f"{model}/model.onnx` with ONNX Runtime" in result.stderr


def test_too_little_memory_is_told(model: Path, tmp_path: Path) -> None:
    """Row D7: a limit on the data segment, which grows until the command gets through."""

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    for size in range(16 << 20, 1 << 30, 48 << 20):
        command = [sys.executable, "-m", "llmfast", *_quantize(model, tmp_path / "output")]
        result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit(size))
        if result.returncode == 0:
            break
        # A library that is being imported may fail in any way when memory ends, and is told as a bug then; OpenBLAS
        # ends the process by itself.
        is_library = "import" in result.stderr or result.stderr.startswith("OpenBLAS error: Memory allocation")
        assert result.returncode in (6, 9) or is_library, result.stderr
        assert list(tmp_path.iterdir()) == []
    assert result.returncode == 0
    assert {row["verdict"] for row in hash_files(tmp_path / "output")} == {"ok"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)], ids=["int", "term", "hup"]
)
@pytest.mark.parametrize("to_group", [True, False], ids=["group", "parent"])
def test_a_signal_ends_the_work_in_time(number: int, code: int, to_group: bool, model: Path, tmp_path: Path) -> None:
    """Rows D5 and D6: in the middle of writing."""
    process = _start(
        "print('here', file=sys.stderr, flush=True); time.sleep(60)", _quantize(model, tmp_path / "output")
    )
    assert process.stderr is not None
    while process.stderr.readline() != "here\n":
        pass
    started = time.monotonic()
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 30
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_native_call_that_ignores_signals_is_cut_off(model: Path, tmp_path: Path) -> None:
    """Row D5: the handler of Python runs when the call is over, which may be never."""
    action = f"{_HERE}; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"
    process = _start(action, _quantize(model, tmp_path / "output"))
    assert process.stderr is not None
    while process.stderr.readline() != "here\n":
        pass
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_the_work_ends_with_its_parent(model: Path, tmp_path: Path) -> None:
    """Row D6."""
    process = _start(
        "print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)", _quantize(model, tmp_path / "o")
    )
    assert process.stderr is not None
    child = int(process.stderr.readline())
    process.kill()
    process.wait()
    for _ in range(200):
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    pytest.fail("the child outlived its parent")


def _run_limited(action: str, model: Path, tmp_path: Path, *limits: str) -> tuple[int, str]:
    process = _start(action, [*limits, *_quantize(model, tmp_path / "output")])
    out, errors = process.communicate(timeout=60)
    assert out == ""
    assert "Traceback" not in errors
    return process.returncode, errors


@pytest.mark.parametrize(
    "action",
    ["time.sleep(60)", "signal.signal(signal.SIGTERM, signal.SIG_IGN); supervisor.ask_for_grace(0.3); time.sleep(60)"],
    ids=["python", "native"],
)
def test_a_command_that_takes_too_long_is_ended(action: str, model: Path, tmp_path: Path) -> None:
    code, errors = _run_limited(f"from llmfast import supervisor; {action}", model, tmp_path, "--timeout", "4")
    assert code == 6
    assert errors.startswith("error: over --timeout 4 while running `llmfast quantize`")
    assert errors.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


_HOLD = "held = bytearray(b'1') * (600 << 20); time.sleep(60)"


class Greedy:
    """Holds memory in a worker process."""

    def __init__(self) -> None:
        self.held = bytearray(b"1") * (600 << 20)
        time.sleep(60)


_WORKER = (
    "import llmfast.worker as worker; worker._BOOT = f'import sys; sys.path[:] = {sys.path!r}; ' + worker._BOOT; "
    f"worker.Worker('{Greedy.__module__}:Greedy')"
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("action", [_HOLD, _WORKER], ids=["own", "worker"])
def test_a_command_that_takes_too_much_memory_is_ended(action: str, model: Path, tmp_path: Path) -> None:
    code, errors = _run_limited(action, model, tmp_path, "--max-memory", "400MiB")
    assert code == 6
    assert "error: over --max-memory 400.0 MiB while running `llmfast quantize`, with " in errors
    assert list(tmp_path.iterdir()) == []


def test_a_command_within_its_limits_is_not_ended(model: Path, tmp_path: Path) -> None:
    process = _start("pass", ["--max-memory", "4GB", "--timeout", "100", *_quantize(model, tmp_path / "output")])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize(
    "limits",
    [("--timeout", "0"), ("--timeout", "nan"), ("--max-memory", "much"), ("--max-memory", "0MB")],
    ids=" ".join,
)
def test_impossible_limits_are_refused(limits: tuple[str, str], model: Path) -> None:
    command = [sys.executable, "-m", "llmfast", *limits, "infer", str(model), "-p", "x"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_of_two_runs_with_one_output_one_wins_whole(model: Path, tmp_path: Path) -> None:
    """Row D12."""
    runs = [_start("time.sleep(0.5)", _quantize(model, tmp_path / "output")) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 8], errors
    assert "output appeared while working" in "".join(errors) or "output exists" in "".join(errors)
    assert {row["verdict"] for row in hash_files(tmp_path / "output")} == {"ok"}
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize(
    "surroundings",
    [
        {"HOME": "/nonexistent"},
        {"TERM": "dumb"},
        {"LC_ALL": "C"},
        {"NO_COLOR": "1", "COLUMNS": "1"},
        {"PYTHONOPTIMIZE": "1"},
        {"TMPDIR": "/nonexistent"},
        {"http_proxy": "http://127.0.0.1:9", "HF_TOKEN": "secret"},
    ],
    ids=lambda surroundings: next(iter(surroundings)),
)
def test_odd_surroundings_are_no_fault(surroundings: dict[str, str], model: Path, tmp_path: Path) -> None:
    """Rows D13 and D20."""
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "OMP_NUM_THREADS", "PYTHONPATH")}
    command = [sys.executable, "-m", "llmfast", "infer", str(model), "-p", "é", "--max-tokens", "2"]
    result = subprocess.run(command, capture_output=True, env=kept | surroundings, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("", 64)])
def test_threads_follow_the_cgroup(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row D15."""
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("llmfast.runtime._CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert usable_cores() == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert usable_cores() == 1


# Raises on any use of the network; sockets of the machine itself are allowed.
_NO_NETWORK = """
import socket, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[0]
        if isinstance(address, (str, bytes)) and event != "socket.getaddrinfo":
            return
        print("NETWORK", event, arguments, file=sys.stderr)
        raise OSError("no network")
sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose sitecustomize closes the network in every process, workers that are not isolated too."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(_NO_NETWORK)
    return folder


def _offline(hook: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "llmfast", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"PYTHONPATH": str(hook), "HF_TOKEN": "secret", "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "NETWORK" not in result.stderr
    assert "secret" not in result.stdout + result.stderr


def test_the_hook_closes_the_network(hook: Path) -> None:
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(hook)}, check=False
    )
    assert "NETWORK" in result.stderr


def test_no_command_uses_the_network(
    hook: Path, model: Path, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Row D20: each command, on what needs no download."""
    fp32, int8 = tmp_path / "fp32", tmp_path / "int8"
    _offline(hook, "export", checkpoints("llama-tied"), "-o", fp32)
    _offline(hook, "quantize", fp32, "-o", int8, "--scheme", "int8", "--num-samples", 1, "--seq-len", 16)
    _offline(hook, "bench", fp32, int8, "-p", 4, "-n", 2, "--rounds", 1, "--warmup", 0)
    _offline(hook, "infer", int8, "-p", "x", "--max-tokens", 2)
    _offline(hook, "inspect", int8)
    _offline(hook, "verify", int8, "--sbom", tmp_path / "bom.json")


def test_exporting_an_encoder_uses_no_network(hook: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    _offline(hook, "export", tmp_path / "encoder", "-o", tmp_path / "fp32")


def test_telemetry_is_off_before_any_library_is_imported() -> None:
    program = (
        "import os, sys\n"
        "import llmfast.cli\n"
        "heavy = {'onnxruntime', 'huggingface_hub', 'transformers', 'torch'} & set(sys.modules)\n"
        "print(sorted(heavy), os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'], "
        "os.environ['DO_NOT_TRACK'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DO_NOT_TRACK"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout == "[] 1 1 1\n"


@pytest.mark.parametrize("damage", ["cut", "rubbish", "gone"])
def test_a_damaged_piece_of_an_interrupted_run_is_made_again(damage: str, tmp_path: Path, model: Path) -> None:
    """Row D19."""
    text = tmp_path / "text.txt"
    text.write_text("some words to calibrate on. " * 40)
    (tmp_path / "place").mkdir()
    whole, output = tmp_path / "whole", tmp_path / "place" / "output"
    more = ["--method", "gptq", "--calibration", str(text), "--seq-len", "32", "--num-samples", "2"]
    process = _start("os.kill(os.getpid(), signal.SIGKILL)", [*_quantize(model, output), *more])
    process.communicate(timeout=60)
    pieces = sorted((tmp_path / "place" / ".output.llmfast-resume").glob("*.npz"))
    assert pieces
    if damage == "gone":
        pieces[0].unlink()
    else:
        content = pieces[0].read_bytes()
        pieces[0].write_bytes(content[: len(content) // 2] if damage == "cut" else b"rubbish")
    for arguments in (["--resume"], []):
        target = output if arguments else whole
        process = _start("pass", [*_quantize(model, target), *more, *arguments])
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert {row["file"]: row["sha256"] for row in hash_files(output)} == {
        row["file"]: row["sha256"] for row in hash_files(whole)
    }
    assert os.listdir(tmp_path / "place") == ["output"]
    shutil.rmtree(output)
