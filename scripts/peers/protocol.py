"""What a peer's script does for `compare.py`: convert a checkpoint once, open it, answer over its standard streams.

Runs in the peer's environment, so it needs nothing but the standard library. The first line that a script writes says
what runs, as JSON: `versions` of its packages and the `bytes` of the model. Then each line it reads, `{"ids": [1, 2],
"tokens": 3}`, is a prompt and how many tokens to generate greedily; it answers with the `tokens` and the `seconds`
each took. The first of these is the prompt's time, one choice of a token included. A line `{"batch": [[1, 2], [3]],
"tokens": 3}` is many prompts at once, answered with the `seconds` that all took. A line `{"ids": [1, 2], "logits":
"FILE.npy"}` asks what the model predicts after each token: it saves them to that file, and answers `{}`. What a peer
can't do it answers with a `reason`.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Source:
    """The model that all are measured with: a Hugging Face folder, and the same weights as a GGUF file, if given."""

    checkpoint: Path
    gguf: Path | None


class Model(Protocol):
    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        """Forget what was before, read a prompt and give `emit` each of `count` tokens at once when it is known.

        Decoding is greedy and does not end at an end token.
        """

    def generate_many(self, batch: list[list[int]], count: int) -> list[int]:
        """Forget what was before, answer each prompt with `count` tokens, chosen as `generate` does.

        A peer that answers one prompt at a time does not have this.

        Returns:
            How many tokens each answer has.
        """

    def score(self, ids: list[int]) -> "np.ndarray":
        """Forget what was before, and return what the model predicts after each token: float32 [n, vocabulary].

        These are logits, or logits plus a number per row, such as log probabilities.
        """


def serve(
    packages: tuple[str, ...],
    convert: Callable[[Source, Path, str], None] | None,
    open_model: Callable[[Path, str, int, int], Model],
) -> None:
    """Answer until standard input ends.

    Args:
        packages: whose versions are told.
        convert: writes the model of a format into a folder; None where the model is given as it is.
        open_model: opens such a folder, in a format, with a number of threads, for a context of so many tokens.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--format", required=True)
    parser.add_argument("--model", type=Path, required=True, help="where the converted model is, or will be")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    options = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the peer's libraries print is no answer
    if convert is not None and not options.model.exists():
        staging = options.model.with_name(f"{options.model.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        convert(Source(options.checkpoint, options.gguf), staging, options.format)
        staging.rename(options.model)
    model = open_model(options.model, options.format, options.threads, options.context)
    hello = {"versions": {name: importlib.metadata.version(name) for name in packages}, "bytes": _size(options.model)}
    print(json.dumps(hello), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _save_scores if "logits" in request else _generate_many if "batch" in request else _generate
        print(json.dumps(answer(model, **request)), file=replies, flush=True)


def _generate(model: Model, ids: list[int], tokens: int) -> dict[str, Any]:
    chosen: list[int] = []
    times = [time.perf_counter()]

    def emit(token: int) -> None:
        times.append(time.perf_counter())
        chosen.append(token)

    model.generate(ids, tokens, emit)
    if len(chosen) != tokens:
        raise RuntimeError(f"generated {len(chosen)} tokens, not {tokens}")
    return {"tokens": chosen, "seconds": [after - before for before, after in itertools.pairwise(times)]}


def _generate_many(model: Model, batch: list[list[int]], tokens: int) -> dict[str, Any]:
    if not hasattr(model, "generate_many"):
        return {"reason": "one prompt at a time"}
    start = time.perf_counter()
    lengths = model.generate_many(batch, tokens)
    seconds = time.perf_counter() - start
    if lengths != [tokens] * len(batch):
        raise RuntimeError(f"answers have {lengths} tokens, not {tokens} each")
    return {"seconds": seconds}


def _save_scores(model: Model, ids: list[int], logits: str) -> dict[str, Any]:
    import numpy as np

    try:
        np.save(logits, np.asarray(model.score(ids), np.float32))
    except Exception as error:  # whatever it is: the model still generates, and its speed is measured
        traceback.print_exc()
        return {"reason": str(error).strip().rpartition("\n")[2] or type(error).__name__}
    return {}


def run(*command: str | Path) -> None:
    """Run a converter; what it prints goes to the log, and its last line is why this script ends if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise SystemExit(done.stdout.strip().rpartition("\n")[2] or f"`{command[0]}` ended with {done.returncode}")


def _size(folder: Path) -> int:
    """Return the bytes of the weights: of the largest files, without tokenizers and settings."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(size for size in sizes if size * 20 > max(sizes, default=0))
