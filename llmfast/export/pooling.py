"""How a sentence-transformers checkpoint makes one vector of many, and the same as PyTorch operations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.bundle import read_json
from llmfast.errors import InputError, UnsafeInputError, UnsupportedError

if TYPE_CHECKING:
    import torch

# The order in which sentence-transformers joins the vectors of several kinds.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_KINDS = ("cls", "max", "mean", "mean_sqrt_len")


@dataclass(frozen=True)
class Pooling:
    """How the vectors of a text's tokens become one.

    Attributes:
        kinds: of `cls`, `max`, `mean`, `mean_sqrt_len`; the vectors of several are joined end to end.
        normalize: scale the result to Euclidean length 1.
        max_seq_length: tokens the checkpoint cuts a text to, None when it doesn't say.
    """

    kinds: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_seq_length: int | None = None


def read_pooling(source: Path) -> Pooling:
    """Read the pooling of a checkpoint; a folder that has no modules.json gets the plain mean.

    Raises:
        InputError: a malformed or missing file.
        UnsafeInputError: a module's path that leaves the folder.
        UnsupportedError: a module, or a kind of pooling, that llmfast can't put into the graph.
    """
    listing = source / "modules.json"
    if not listing.is_file():
        return Pooling()
    kinds: tuple[str, ...] | None = None
    normalize = False
    for name, path in _modules(listing):
        if name == "Transformer" and not path:
            continue
        if name == "Pooling" and kinds is None:
            kinds = _kinds(source / path / "config.json")
        elif name == "Normalize" and kinds:
            normalize = True
        else:
            raise UnsupportedError(
                f"module `{name}` at `{path}` of `{listing}` is not supported",
                "llmfast exports a Transformer in the folder itself, one Pooling, and Normalize after it",
            )
    return Pooling(kinds or Pooling.kinds, normalize, _max_seq_length(source / "sentence_bert_config.json"))


def pool(hidden: "torch.Tensor", mask: "torch.Tensor", pooling: Pooling) -> "torch.Tensor":
    """Make one vector of each text's token vectors.

    Args:
        hidden: float32 [batch, seq, hidden].
        mask: int64 [batch, seq], 1 for tokens and 0 for the padding on their right.
        pooling: what to do.

    Returns:
        float32 [batch, hidden * number of kinds].
    """
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    total = (hidden * weights).sum(1)
    count = weights.sum(1).clamp(min=1e-9)
    smallest = torch.finfo(hidden.dtype).min
    vectors = {
        "cls": lambda: hidden[:, 0],
        "max": lambda: hidden.masked_fill(weights == 0, smallest).amax(1),
        "mean": lambda: total / count,
        "mean_sqrt_len": lambda: total / count.sqrt(),
    }
    pooled = torch.cat([vectors[kind]() for kind in pooling.kinds], -1)
    return pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12) if pooling.normalize else pooled


def read_output(result: Any, name: str, mask: "torch.Tensor | None", pooling: Pooling | None) -> "torch.Tensor":
    """Return one of the graph's outputs from what a PyTorch model returned."""
    if name == "sentence_embedding" and mask is not None and pooling is not None:
        return pool(result["last_hidden_state"], mask, pooling)
    if name == "image_embedding":  # the vector of the class token, which stands before those of the patches
        vectors: torch.Tensor = result["last_hidden_state"][:, 0]
        return vectors
    tensor: torch.Tensor = result[name]
    return tensor


def _modules(listing: Path) -> list[tuple[str, str]]:
    """Return class name and folder of each module, in order."""
    entries = read_json(listing)
    try:
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (KeyError, TypeError) as error:
        raise InputError(f"malformed `{listing}`: an entry lacks `type` or `path`") from error
    for _, path in modules:
        if path and (Path(path).name != path or path == ".."):
            raise UnsafeInputError(f"module path `{path}` of `{listing}` leaves the folder")
    return modules


def _kinds(path: Path) -> tuple[str, ...]:
    config = read_object(path)
    named = config.get("pooling_mode")  # since sentence-transformers 6; flags before
    if named is None:
        kinds = tuple(kind for flag, kind in _FLAGS.items() if config.get(flag)) or ("mean",)
    else:
        kinds = tuple(str(kind).removesuffix("_tokens") for kind in (named if isinstance(named, list) else [named]))
    for kind in kinds:
        if kind not in _KINDS:
            raise UnsupportedError(f"pooling `{kind}` of `{path}` is not supported", f"supported: {', '.join(_KINDS)}")
    return kinds


def _max_seq_length(path: Path) -> int | None:
    length = read_object(path).get("max_seq_length") if path.is_file() else None
    if length is not None and (not isinstance(length, int) or length < 1):
        raise InputError(f"malformed `{path}`: max_seq_length is `{length}`")
    return length


def read_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON file that holds an object; anything else in it is an `InputError`."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"malformed `{path}`: not a JSON object")
    return document
