"""Vocabulary trimming: a float bundle whose embedding, head and tokenizer keep only what a corpus needs.

Embedding and head of a small model are a fifth to a half of its weights. The tokens left out can no longer be read
or written as one; text is still encoded, into smaller pieces. It pays for one language, or one domain.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import llmfast
from llmfast import report
from llmfast.bundle import COMPANIONS, TEXT_GENERATION, ModelBundle, Step, read_json, sha256, write_manifest
from llmfast.errors import InputError, UnsupportedError
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.linear import find_linears, lone_adds, with_bias
from llmfast.graph.model import OnnxModel, count_parameters, reads
from llmfast.graph.weights import WeightFile
from llmfast.quantize.plan import HEAD_ROLE
from llmfast.text import read_text
from llmfast.tokenizer import Tokenizer
from llmfast.vocabulary import Vocabulary, choose_tokens, trim_settings, trim_tokenizer

_SETTINGS = ("config.json", "generation_config.json")
# A conversation, so that the tokens of a chat template stay.
_CONVERSATION = (
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
)


@contextlib.contextmanager
def trimmed(source: Path, output: Path, corpus: Path) -> Iterator[Path]:
    """Yield a bundle with a smaller vocabulary, in a directory beside `output` that goes away; say what was left out.

    Raises:
        InputError, UnsupportedError: as `trim_vocabulary`.
    """
    bundle = ModelBundle.open(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.trimmed-", dir=output.parent) as folder:
        path = Path(folder)
        _, vocabulary = trim_vocabulary(bundle, corpus, path)
        kept, rows = len(vocabulary.kept), bundle.manifest.architecture.get("vocab_size")
        report.note(
            f"note: {kept:,} of {rows:,} tokens stay; of further text like `{corpus}` about {vocabulary.coverage:.1%} "
            "of the tokens are among them, the rest is spelled in smaller pieces"
        )
        yield path


def trim_vocabulary(bundle: ModelBundle, corpus: Path, folder: Path) -> tuple[ModelBundle, Vocabulary]:
    """Write a float bundle with a smaller vocabulary.

    Args:
        bundle: a text-generation bundle, or an encoder without a head over the vocabulary.
        corpus: UTF-8 text; every token in it stays, so it is encoded as before.
        folder: an empty directory.

    Raises:
        InputError: no tokenizer, or an empty corpus.
        UnsupportedError: a tokenizer of a kind that can't be cut, or a graph whose tables are not found.
    """
    if not bundle.manifest.files:
        raise UnsupportedError(f"`{bundle.path}` is no bundle of llmfast's", "run `llmfast export` first")
    if len(bundle.graphs) > 1:
        raise UnsupportedError(
            f"the vocabulary of `{bundle.path}` can't be trimmed: it has an encoder and a decoder",
            "decoders, and encoders without a head over the vocabulary, can be trimmed",
        )
    path = bundle.companion("tokenizer.json")
    if path is None:
        raise InputError(f"no tokenizer in `{bundle.path}`", "the vocabulary is trimmed by its tokenizer.json")
    document = read_json(path)
    model = OnnxModel.load(bundle.model)
    table = _embedding(model)
    rows = int(model.initializers[table].dims[0])
    vocabulary = choose_tokens(document, corpus_ids(bundle.path, corpus), rows)
    _write_graph(model, _tables(model, table, rows, bundle), rows, vocabulary, folder)
    for name in COMPANIONS:
        if companion := bundle.companion(name):
            shutil.copyfile(companion, folder / name)
    for name in _SETTINGS:
        if companion := bundle.companion(name):
            write_json(folder / name, trim_settings(read_json(companion), vocabulary))
    write_json(folder / "tokenizer.json", trim_tokenizer(document, vocabulary))
    architecture: dict[str, Any] = dict(trim_settings(dict(bundle.manifest.architecture), vocabulary))
    architecture["num_parameters"] = count_parameters([OnnxModel.load(folder / bundle.model.name)])
    step = Step(
        stage="trim",
        method="vocabulary",
        options={"tokens": len(vocabulary.kept), "coverage": vocabulary.coverage},
        versions={"llmfast": llmfast.__version__},
        calibration={"name": corpus.name, "sha256": sha256(corpus)},
    )
    lineage = (*bundle.manifest.lineage, step)
    write_manifest(folder, replace(bundle.manifest, architecture=architecture, lineage=lineage))
    return ModelBundle.open(folder), vocabulary


def corpus_ids(folder: Path, corpus: Path) -> list[int]:
    """Return the tokens of a text, and those of a conversation where the tokenizer in `folder` has a template."""
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(read_text(corpus))
    if tokenizer.chat_template is not None:
        # Without a system message many templates write one of their own; with one, many refuse.
        for messages in (_CONVERSATION[1:], _CONVERSATION):
            with contextlib.suppress(InputError):
                ids += tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    return ids


def _embedding(model: OnnxModel) -> str:
    """Return the initializer that `input_ids` choose rows of."""
    for node in model.proto.graph.node:
        if node.op_type == "Gather" and node.input[1] == "input_ids" and node.input[0] in model.initializers:
            return str(node.input[0])
    raise UnsupportedError(f"`{model.path}` has no embedding that `input_ids` choose from", "trim the float model")


def _tables(model: OnnxModel, embedding: str, rows: int, bundle: ModelBundle) -> dict[str, int]:
    """Return the initializers with an entry per token: name -> the axis of the tokens."""
    tables = {embedding: 0}
    if bundle.manifest.task != TEXT_GENERATION:
        return tables
    heads = [one for one in find_linears(model) if one.role == HEAD_ROLE or embedding == one.weight]
    if not heads or any(one.shape[0] != rows for one in heads):
        raise UnsupportedError(f"`{model.path}`: the head is not found, or has not one row per token of the embedding")
    adds = lone_adds(model)
    biases = {one.bias: 0 for one in (with_bias(model, head, adds) for head in heads) if one.bias}
    return tables | biases | {one.weight: 0 if one.stored_transposed else 1 for one in heads}


def _write_graph(model: OnnxModel, tables: dict[str, int], rows: int, vocabulary: Vocabulary, folder: Path) -> None:
    weights = WeightFile(folder, model.path.stem)
    graph = GraphBuilder(weights, model.opset)
    for node in model.proto.graph.node:
        for name in reads(node):
            if name in model.initializers:
                graph.weight(name, _trim(model, name, tables, vocabulary))
        graph.keep(node)
    proto = graph.rewrite(model)
    for output in proto.graph.output:
        _resize(output, rows, len(vocabulary.kept))
    unchanged = [value for value in proto.graph.value_info if not _has_dimension(value, rows)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(unchanged)
    weights.save(proto)


def _trim(model: OnnxModel, name: str, tables: dict[str, int], vocabulary: Vocabulary) -> np.ndarray:
    array = model.read(model.initializers[name])
    return array if name not in tables else np.take(array, vocabulary.kept, axis=tables[name])


def _has_dimension(value: onnx.ValueInfoProto, size: int) -> bool:
    return any(dim.dim_value == size for dim in value.type.tensor_type.shape.dim)


def _resize(output: onnx.ValueInfoProto, rows: int, kept: int) -> None:
    dims: Sequence[Any] = output.type.tensor_type.shape.dim
    if output.name == "logits" and dims and dims[-1].dim_value == rows:
        dims[-1].dim_value = kept


def write_json(path: Path, document: Any) -> None:
    """Write settings or a tokenizer."""
    path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
