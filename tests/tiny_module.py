"""Files with modules of a user's own, and what tests do with them."""

import textwrap
from pathlib import Path

import numpy as np
import onnxruntime
from typer.testing import CliRunner

from llmfast.cli import app
from llmfast.export.module_parity import prove_module
from llmfast.export.module_trace import trace_module
from llmfast.export.user_module import UserModule, load_user_module
from llmfast.graph.model import OnnxModel

RECIPE = Path(__file__).parent.parent / "recipes" / "transformer.py"
HEADER = """
import torch
from torch import nn
from torch.nn import functional as F

"""


def write(folder: Path, code: str) -> Path:
    file = folder / "own.py"
    file.write_text(HEADER + textwrap.dedent(code))
    return file


def load(folder: Path, code: str, weights: Path | None = None) -> UserModule:
    return load_user_module(write(folder, code), "factory", weights)


def export(folder: Path, user: UserModule) -> tuple[OnnxModel, dict]:
    axes, _ = trace_module(user, folder)
    return OnnxModel.load(folder / "model.onnx"), prove_module(user, folder / "model.onnx", axes, 1)


def module(forward: str, examples: str, axes: str = "None", init: str = "pass") -> str:
    """Return a file with a module of one linear layer and whatever `init` adds."""
    lines = textwrap.indent(textwrap.dedent(forward).strip(), " " * 8)
    return (
        "class Own(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.linear = nn.Linear(8, 8)\n"
        f"        {init}\n\n"
        f"    def forward(self, x):\n{lines}\n\n\n"
        f"def factory():\n    torch.manual_seed(0)\n    return Own(), {examples}, {axes}\n"
    )


def run_cli(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_graph(file: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, feeds)
