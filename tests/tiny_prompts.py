"""Files of prompts for a tiny decoder, and what it answers to one at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.infer.engine import Engine
from llmfast.infer.generate import finish, generate
from llmfast.infer.sampling import Sampling
from llmfast.tokenizer import Tokenizer


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def infer_file(model: Path, source: Path, output: Path, *arguments: object) -> Any:
    command = ["infer", model, "--input", source, "--output", output, "--threads", 1, *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in command])


def greedy(model: Path, prompt: str, max_tokens: int, **sampling: Any) -> Any:
    tokenizer = Tokenizer.load(model)
    ids = np.array(tokenizer.encode(prompt), np.int64)
    engine = Engine(ModelBundle.open(model), threads=1)
    return finish(generate(engine, tokenizer, ids, max_tokens, Sampling(**sampling), (), tokenizer.eos_ids))
