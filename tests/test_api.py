"""The Python interface: what it names is what the commands call, and its tutorial runs."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmfast
from llmfast import api
from llmfast.errors import LlmfastError
from scripts.api_reference import reference
from tests.conftest import ARCHITECTURES, write_checkpoint

ROOT = Path(llmfast.__file__).parent
TUTORIAL = ROOT.parent / "docs" / "python.md"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "SmolLM2-135M-Instruct", *ARCHITECTURES["llama-tied"])
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the dog lay beside it. " * 20)
    prompts = [json.dumps({"prompt": f"number {number}"}) for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    blocks = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "tutorial"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{TUTORIAL.name}, block {number}", "exec"), names)


def test_every_command_calls_what_programs_can_call() -> None:
    public = {getattr(api, name) for name in api.__all__}
    for path in (ROOT / "commands").glob("[a-z]*.py"):
        if path.stem != "verify":  # its command is made of parts: hashes, comparison, bill of materials
            verb = getattr(api, path.stem)
            assert verb in public
            imported = {
                (node.module, alias.name)
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            module = verb.__module__
            assert {(module, path.stem), (module.rpartition(".")[0], "stage")} & imported


def test_everything_public_is_documented() -> None:
    assert api.__all__ == sorted(api.__all__)
    for name in api.__all__:
        public = getattr(api, name)
        is_error = inspect.isclass(public) and issubclass(public, LlmfastError)
        described = re.findall(r"^ +(\w+): ", (LlmfastError if is_error else public).__doc__, re.M)
        assert public.__doc__, name
        assert {*inspect.signature(public).parameters} <= {*described}, name


def test_the_reference_is_what_the_docstrings_say() -> None:
    page = ROOT.parent / "docs" / "api.md"
    assert page.read_text(encoding="utf-8") == f"{reference()}\n", "python scripts/api_reference.py > docs/api.md"


def test_importing_it_loads_no_training_stack_and_no_runtime() -> None:
    heavy = {"torch", "transformers", "onnxruntime", "ray", "rich"}
    program = f"import sys, llmfast.api; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
