"""The command line: exit codes, what goes to stdout and stderr, signals."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmfast import __version__
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.infer import memory
from llmfast.serve import model as served


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _explains(result, code: int, *words: str) -> None:
    """One error line, one hint at most, the exit code, nothing on stdout."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.count("hint: ") <= 1
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout == f"llmfast {__version__}\n"
    for command in ("export", "prune", "tune", "quantize", "bench", "infer", "serve", "inspect", "doctor"):
        result = run(command, "-h")
        assert result.exit_code == 0
        assert "Example: llmfast " in result.stdout


@pytest.mark.parametrize(("command", "rows"), [("infer", memory.DEFAULT_ROWS), ("serve", served.DEFAULT_ROWS)])
def test_help_tells_how_many_rows_there_are(command: str, rows: int) -> None:
    told = " ".join(re.sub("[│|]", " ", run(command, "--help").stdout).split())
    assert re.search(rf"answered at once[^.]*; {rows} by default", told)


def test_pipeline_from_checkpoint_to_answer(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    fp32, int8 = tmp_path / "fp32", tmp_path / "int8"
    result = run("export", checkpoints("llama-tied"), "-o", fp32)
    assert result.exit_code == 0, result.output
    assert "differs from PyTorch by at most" in result.stdout
    result = run("quantize", fp32, "-o", int8, "--scheme", "int8", "--format", "json")
    assert result.exit_code == 0, result.output
    assert {row["role"] for row in json.loads(result.stdout)["layers"]} >= {"embedding", "qkv_proj", "down_proj"}
    result = run("infer", int8, "--prompt", "hello", "--max-tokens", "4", "--format", "json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["generated_tokens"] <= 4) == ("hello", True)
    assert "prompt tokens" in result.stderr
    result = run("infer", int8, "-p", "hello", "-p", "ab", "--max-tokens", "4", "--format", "json")
    assert result.exit_code == 0, result.output
    several = json.loads(result.stdout)
    assert [(one["text"], sorted(one)) for one in several] == [("hello", sorted(answer)), ("ab", sorted(answer))]
    assert several[0]["answer"] == answer["answer"]
    data = tmp_path / "text.txt"
    data.write_text("some text to measure on, again and again. " * 20, encoding="utf-8")
    sizes = ["-p", "16", "-n", "4", "--rounds", "2", "--num-samples", "2", "--seq-len", "32"]
    result = run("bench", fp32, int8, *sizes, "--data", data, "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert rows[0]["kld"] == 0
    assert 0 < rows[1]["kld"] < 1
    assert rows[1]["size_bytes"] == ModelBundle.open(int8).size_bytes


def test_gates_decide_the_exit_code(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "int4"
    assert run("quantize", fp32_bundle, "-o", bundle, "--scheme", "int4").exit_code == 0
    data = tmp_path / "text.txt"
    data.write_text("words to measure on " * 40, encoding="utf-8")
    bench = ["bench", fp32_bundle, bundle, "-p", "8", "-n", "4", "--rounds", "1", "--warmup", "0"]
    bench += ["--num-samples", "2", "--seq-len", "32"]
    result = run(*bench, "--data", data, "--max-kld", "99", "--max-size", "1")
    assert result.exit_code == 0, result.output
    assert "passed: `int4` kld" in result.stdout
    result = run(*bench, "--data", data, "--max-kld", "1e-9", "--format", "json")
    assert result.exit_code == 7
    (entry,) = json.loads(result.stdout)["verdict"]
    assert (entry["bundle"], entry["figure"], entry["passed"]) == ("int4", "kld", False)
    assert "error: gate missed: `int4` kld" in result.stderr
    _explains(run(*bench, "--max-kld", "1"), 2, "needs --data")
    _explains(run(*bench, "--min-speedup", "bogus=2"), 2, "`bogus`", "prefill_tokens_per_s")
    _explains(run(*bench, "--min-speedup", "perplexity=1"), 2, "no speed of this run")
    _explains(run(*bench, "--max-kld", "nan"), 2, "the limit nan")
    _explains(run(*bench, "--min-speedup", "decode"), 2, "not METRIC=X")


def test_dry_run_writes_nothing(checkpoints: Callable[[str], Path], fp32_bundle: Path, tmp_path: Path) -> None:
    assert (
        "would write a llama decoder" in run("export", checkpoints("llama"), "-o", tmp_path / "x", "--dry-run").stdout
    )
    result = run("quantize", fp32_bundle, "-o", tmp_path / "x", "--scheme", "int4", "--dry-run", "--format", "csv")
    assert result.stdout.startswith("role,layers,num_parameters,bits\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("typed", [["--activations", "static"], ["--set", "activations=static"]])
def test_activations_are_an_option_of_the_scheme(typed: list[str], fp32_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--scheme", "int8", "--num-samples", "1", "--seq-len", "16", "--no-measure"]
    assert run("quantize", fp32_bundle, "-o", tmp_path / "out", *arguments, *typed).exit_code == 0
    step = ModelBundle.open(tmp_path / "out").manifest.lineage[-1]
    assert step.options["int8"]["activations"] == "static"
    assert step.calibration is not None


_AS_INSTALLED = "import sys; sys.argv[0] = 'llmfast'; from llmfast.cli import main; main()"


@pytest.mark.parametrize(
    ("typed", "found"), [("qu", "quantize"), ("infer --ovw", ""), ("infer --overw", "--overwrite")]
)
def test_the_shell_completes_commands_and_options(typed: str, found: str) -> None:
    words = f"llmfast {typed}"
    shell = {"_LLMFAST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = subprocess.run(
        [sys.executable, "-c", _AS_INSTALLED], capture_output=True, text=True, env=os.environ | shell
    )
    assert (result.stdout.strip(), result.stderr) == (found, "")


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="there is no bash")
def test_completion_is_installed_for_the_shell(tmp_path: Path) -> None:
    # The shell has to be there when it is asked for: `:` keeps bash from becoming the program itself.
    command = f'"{sys.executable}" -c "{_AS_INSTALLED}" --install-completion; :'
    home = {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    result = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, env=os.environ | home)
    assert "bash completion installed" in result.stdout, result.stderr
    assert "_LLMFAST_COMPLETE" in (tmp_path / ".bash_completions" / "llmfast.sh").read_text()


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_help_fits_terminals_of_any_width(columns: str) -> None:
    command = [sys.executable, "-m", "llmfast", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": columns})
    assert (result.returncode, result.stderr) == (0, "")
    assert "quantize" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= max(int(columns), 80)


def test_list_names_schemes_and_methods() -> None:
    result = run("quantize", "--list")
    assert "int4" in result.stdout
    assert "--set block_size=32" in result.stdout
    rows = {row["name"]: row for row in json.loads(run("quantize", "--list", "--format", "json").stdout)}
    assert rows["int4"]["kind"] == "schemes"
    assert rows["int4"]["options"]["block_size"] == 32
    assert run("tune", "--list", "--format", "csv").stdout.startswith("kind,name,summary,options\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "nowhere", "-o", "{tmp}/x"], 3, ["not found", "`nowhere`"]),
        (["export", "nowhere/model.gguf", "-o", "{tmp}/x"], 3, ["not found", "`nowhere/model.gguf`", ".gguf file"]),
        (["export", "{tmp}", "-o", "{tmp}/../x"], 3, ["no config.json"]),
        (["export", "{fp32}", "-o", "{tmp}/x"], 3, ["is a bundle, no checkpoint", "exported already"]),
        (["quantize", "{tmp}", "-o", "{tmp}/../x", "--scheme", "int8"], 3, ["no model in"]),
        (["quantize", "{fp32}", "-o", "{tmp}/x", "--scheme", "int3"], 2, ["unknown scheme `int3`", "did you mean"]),
        (["quantize", "{fp32}", "-o", "{tmp}/x", "--scheme", "int4", "--set", "x"], 2, ["not KEY=VALUE"]),
        (["quantise"], 2, ["no such command `quantise`", "`quantize`"]),
        (["quantize", "{fp32}", "--outptu", "x"], 2, ["no such option: --outptu", "--output", "quantize --help"]),
        (["quantize", "{fp32}"], 2, ["needs --output"]),
        (["quantize", "{fp32}", "-o", "{tmp}/x", "--scheme", "w8", "--activations", "static"], 2, ["`w8`", "int8"]),
        (["quantize", "{fp32}", "-o", "{tmp}/x", "--scheme", "int8", "--activations", "x"], 2, ["dynamic, static"]),
        (
            [
                "quantize",
                "{fp32}",
                "-o",
                "{tmp}/x",
                "--scheme=int8",
                "--activations=static",
                "--set=int8.activations=dynamic",
            ],
            2,
            ["contradicts --set int8.activations"],
        ),
        (["quantize", "{fp32}", "-o", "{fp32}", "--scheme", "int4", "--overwrite"], 2, ["overlaps"]),
        (["quantize", "{fp32}", "-o", "{tmp}", "--scheme", "int4"], 8, ["output exists", "--overwrite"]),
        (["infer", "{tmp}/none", "--prompt", "x"], 3, ["not found"]),
        (["infer", "{fp32}", "--prompt", "x" * 600], 3, ["600 tokens", "512"]),
        (["infer", "{fp32}", "--prompt", "x", "--max-tokens", "0"], 2, ["--max-tokens 0"]),
        (["infer", "{fp32}", "--prompt", "x", "--provider", "cuda"], 5, ["CUDAExecutionProvider", "llmfast[cuda]"]),
        (["infer", "{fp32}", "--prompt", "x", "--threads", "0"], 2, ["--threads 0"]),
        (["infer", "{fp32}", "--prompt", "x", "--format", "xml"], 2, ["unknown format `xml`"]),
        (["bench", "{tmp}/none"], 3, ["not found"]),
        (["bench", "{fp32}", "-p", "16", "-n", "4", "--data", "{tmp}/none.txt"], 3, ["none.txt"]),
        (["bench", "{fp32}", "-p", "16", "-n", "4", "--data", "{empty}"], 3, ["empty.txt"]),
        (["bench", "{fp32}", "--rounds", "0"], 2, ["--rounds 0"]),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], code: int, words: list[str], fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("mistake")
    inside = place / "inside"
    inside.mkdir()
    (place / "empty.txt").write_text(" \n")
    known = {"tmp": inside, "fp32": fp32_bundle, "empty": place / "empty.txt"}
    _explains(run(*[argument.format(**known) for argument in arguments]), code, *words)
    assert sorted(path.name for path in place.iterdir()) == ["empty.txt", "inside"]
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (["explode"], "no such command `explode`", "llmfast"),
        (["export"], "missing option `--output` / `-o`", "llmfast export"),
        (["infer", "x", "--prompt"], "requires an argument", "llmfast infer"),
        (["infer", "x", "--max-tokens", "many"], "invalid value for `--max-tokens`: ", "llmfast infer"),
        (["infer", "x", "--max-tokens", "many"], "a valid integer", "llmfast infer"),
        (["infer", "x", "What is it?"], "unexpected argument: What is it?", "llmfast infer"),
        (["--nope"], "no such option: --nope", "llmfast"),
        (["bench", "--formt", "json"], "no such option: --formt", "llmfast bench"),
    ],
)
def test_wrong_usage_reads_like_any_other_error(arguments: list[str], message: str, command: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    error, _, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint == f"hint: {command} --help"


def test_missing_export_extra_is_named(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    _explains(run("export", checkpoints("llama"), "-o", tmp_path / "x"), 5, "pip install 'llmfast[export]'")


def test_standard_input_that_is_no_text_is_bad_input(fp32_bundle: Path) -> None:
    result = CliRunner().invoke(app, ["infer", str(fp32_bundle), "--prompt", "-"], input=b"caf\xe9")
    _explains(result, 3, "standard input: byte 3", "UTF-8")


def test_truncated_model_and_missing_data_are_named(
    fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ModelBundle.open(fp32_bundle).model.read_bytes()
    for part in range(1, 16):
        model = tmp_path / "cut.onnx"
        model.write_bytes(whole[: len(whole) * part // 16])
        _explains(run("quantize", model, "-o", tmp_path / "x", "--scheme", "int8"), 3, "cut.onnx")
    model.unlink()
    assert list(tmp_path.iterdir()) == []


def _start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llmfast", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay_s", [0.05, 1.0, 2.0])
def test_signals_leave_nothing_behind(
    number: signal.Signals, code: int, delay_s: float, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    process = _start("export", checkpoints("qwen3"), "-o", tmp_path / "bundle")
    time.sleep(delay_s)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        assert ModelBundle.open(tmp_path / "bundle")  # it was faster
    else:
        assert process.returncode in (code, -number)  # -number: before Python could install its handlers
        assert "Traceback" not in errors or process.returncode == -number
        assert list(tmp_path.iterdir()) == []


def test_missed_gate_counts_even_when_nobody_reads(fp32_bundle: Path) -> None:
    process = _start(
        "bench", fp32_bundle, "-p", "8", "-n", "4", "--rounds", "1", "--warmup", "0", "--max-size", "0.001"
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 7
    assert "gate missed" in errors


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["quantize", "--list"]])
def test_full_output_is_a_resource_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "llmfast", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 6
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_closed_streams_are_no_error(fp32_bundle: Path) -> None:
    command = f"{sys.executable} -m llmfast infer {fp32_bundle} -p - --max-tokens 2 <&- >&-"
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert result.returncode == 3  # an empty prompt


@pytest.mark.parametrize("rows", [1, 9])  # on its side, and one row below another
def test_narrow_terminals_get_the_whole_table(rows: int) -> None:
    import pty

    program = (
        "from llmfast.report import Column, print_table\n"
        "columns = [Column(f'a long title {i}', f'key{i}') for i in range(9)]\n"
        "row = {f'key{i}': 'value' * (i % 4 + 1) for i in range(9)}\n"
        f"print_table([row] * {rows}, columns)"
    )
    parent, child = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stdout=child, check=True, env={**os.environ, "COLUMNS": "60"})
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says the end of a terminal with an error
        while block := os.read(parent, 4096):
            shown += block
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()
    assert "".join(lines).count("value") == rows * 21
    assert sum("a long title 0" in line for line in lines) == rows
    assert all(len(line) <= 60 for line in lines)


def test_reader_that_leaves_early_is_no_error(fp32_bundle: Path) -> None:
    process = _start("quantize", "--list")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() in (0, 120)
    assert "Traceback" not in errors
