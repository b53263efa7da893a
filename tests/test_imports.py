"""The rules that keep the program light and its layers apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmfast
from llmfast import registry

ROOT = Path(llmfast.__file__).parent
HEAVY = {"torch", "transformers", "optimum", "numpy", "onnx", "onnxruntime", "tokenizers", "rich", "jinja2", "gguf"}
HEAVY |= {"peft", "matplotlib", "lm_eval", "datasets", "ray", "pyarrow", "pandas"}
CHECKPOINT_STACK = {"torch", "transformers", "optimum", "gguf", "huggingface_hub", "peft"}
CHECKPOINT_FOLDERS = ("export", "tune", "prune/checkpoint", "prune/structured")
PLUGIN_FOLDERS = (
    *("quantize.schemes", "quantize.rounding", "bench.metrics", "tasks", "providers", "export.decoders"),
    *("prune.structured", "prune.masks", "tune.objectives"),
)
COMMANDS = ("export", "prune", "tune", "quantize", "bench", "infer", "serve", "inspect", "doctor")
STAGES = {f"llmfast.{stage}.stage" for stage in COMMANDS}
STAGES |= {"llmfast.prune.checkpoint.stage", "llmfast.prune.graph.stage"}


def _modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_loads_no_heavy_module(arguments: list[str]) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['llmfast', *{arguments!r}, '--help']\n"
        "try: runpy.run_module('llmfast', run_name='__main__')\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_training_stack_is_imported_by_what_reads_checkpoints_only(path: Path) -> None:
    roots = {name.partition(".")[0] for name in _imports(path)}
    if not path.relative_to(ROOT).as_posix().startswith(tuple(f"{folder}/" for folder in CHECKPOINT_FOLDERS)):
        assert not roots & CHECKPOINT_STACK


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_plugins_import_neither_each_other_nor_a_stage(folder: str) -> None:
    names = {f"llmfast.{folder}.{name.replace('-', '_')}" for name in registry.names(folder)}
    assert names
    for name in names:
        imported = _imports(ROOT / Path(*name.split(".")[1:]).with_suffix(".py"))
        assert not imported & (names | STAGES | {"llmfast.cli", "llmfast.commands"})


def test_only_the_command_line_and_stages_know_the_command_line() -> None:
    callers = {path.name for path in _modules() if "llmfast.cli" in _imports(path)}
    callers |= {path.name for path in _modules() if "llmfast.commands" in _imports(path)}
    assert callers == {"__main__.py", "cli.py"}


def test_files_stay_readable() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _modules()}
    assert {path.name: count for path, count in lines.items() if count > 360} == {}
    assert not {"utils.py", "common.py", "base.py"} & {path.name for path in lines}
