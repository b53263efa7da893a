"""The hidden size shrinks, in every block alike, and with it everything that reads or writes the residual stream.

`rotation` (decoders with RMS norms): the stream's principal directions become its channels, and the last ones go,
as in SliceGPT (Ashkboos et al. 2024, https://arxiv.org/abs/2401.15024), but with one rotation for the whole model, so
that no matrix is left between blocks and the result is a plain checkpoint. The norms' scales are folded into the
layers after them, which is exact; so is the rotation. What is lost is the directions that go, and the norms' mean,
which is over fewer channels; layers that read are refitted by least squares. A head that shares the embedding's
weights can't, so it gets weights of its own. `channels`: channels of the stream go as they are: the head stays
shared, and it works with layer norms too (BERT), where the rotation can't. `auto` rotates unless the head is shared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfast.errors import OptionError, UnsupportedError
from llmfast.prune.checkpoint.compensate import largest
from llmfast.prune.checkpoint.families import Family, head_size
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.prune.structured._layer_norm_width import cut_layer_norm_model
from llmfast.prune.structured._moments import Moments, collect, rms_normalized
from llmfast.report import note

if TYPE_CHECKING:
    import torch

TAKES_RATIO = True
_BASES = ("auto", "rotation", "channels")


@dataclass(frozen=True)
class Options:
    """Options of cutting the hidden size.

    Attributes:
        basis: what the channels that stay are: rotation, channels or auto.
        multiple_of: the new size is rounded to a multiple of it, and of the number of heads.
    """

    basis: str = "auto"
    multiple_of: int = 8

    def __post_init__(self) -> None:
        if self.basis not in _BASES:
            raise OptionError(f"width: unknown basis `{self.basis}`", f"choose from: {', '.join(_BASES)}")
        if self.multiple_of < 1:
            raise OptionError(f"width: multiple_of {self.multiple_of}: must be at least 1")


def size_of(family: Family) -> str:
    """Return the config's field that gets smaller."""
    return "hidden_size"


def resize(config: Any, family: Family, ratio: float, options: Options) -> dict[str, Any]:
    """Return the config's changes for a share of the hidden size.

    Raises:
        OptionError: no channel would stay, or a rotation of a model with layer norms.
        UnsupportedError: norms whose scales stay on the residual stream.
    """
    if not family.takes_width:
        raise UnsupportedError(f"the hidden size of a `{config.model_type}` can't be cut: norms follow its layers too")
    if options.basis == "rotation" and not family.norms:
        raise OptionError(
            f"width: a `{config.model_type}` has layer norms, which do not rotate", "--set basis=channels"
        )
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    step = math.lcm(options.multiple_of, heads) if family.has_head_size else head_size(config)
    kept = min(width, round((1 - ratio) * width / step) * step) if ratio else width
    if kept < 1:
        raise OptionError(f"ratio {ratio:g} removes all {width} hidden channels", f"they go in steps of {step}")
    if kept == width:
        return {}
    if not family.has_head_size:
        return {"hidden_size": kept, "num_attention_heads": kept // head_size(config)}
    untied = {"tie_word_embeddings": False} if config.tie_word_embeddings and options.basis == "rotation" else {}
    return {"hidden_size": kept, "head_dim": head_size(config), **untied}


def prune(workpiece: Workpiece, changes: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Cut the hidden size."""
    before, after = workpiece.config.hidden_size, changes["hidden_size"]
    if not workpiece.family.norms:
        heads = f"{changes['num_attention_heads']} of {workpiece.config.num_attention_heads} heads in each block"
        cut_layer_norm_model(workpiece, changes)
        note(f"width: {after} of {before} hidden channels stay, and {heads}")
        return {"hidden_size": after, "basis": "channels"}
    is_rotation = options.basis == "rotation" or (options.basis == "auto" and not workpiece.config.tie_word_embeddings)
    norms = _norms(workpiece)
    basis = _principal(workpiece, norms, after) if is_rotation else _strongest(workpiece, norms, after)
    moments = collect(workpiece, list(norms), basis, float(workpiece.config.rms_norm_eps))
    _cut(workpiece, changes, norms, basis, moments)
    what = "principal directions" if is_rotation else "channels"
    note(f"width: {after} of {before} hidden channels stay, {what} of the residual stream")
    return {"hidden_size": after, "basis": "rotation" if is_rotation else "channels"}


def _norms(workpiece: Workpiece) -> dict[str, list[str]]:
    """Return each norm of the residual stream and the layers that read it."""
    family = workpiece.family
    found = {
        workpiece.block_name(index, norm): [workpiece.block_name(index, reader) for reader in readers]
        for index in range(workpiece.num_blocks)
        for norm, readers in family.norms.items()
    }
    base = workpiece.model.base_model_prefix
    return found | {f"{base}.{family.final_norm}": ["lm_head"]}


def _principal(workpiece: Workpiece, norms: Mapping[str, list[str]], count: int) -> "torch.Tensor":
    """Return the principal directions of what the norms read, each norm counted alike, float32 [d, count]."""
    import torch

    sums = torch.zeros(workpiece.config.hidden_size, workpiece.config.hidden_size)
    epsilon = float(workpiece.config.rms_norm_eps)

    def add(rows: torch.Tensor) -> None:
        normalized = rms_normalized(rows, epsilon)
        sums.addmm_(normalized.T, normalized)

    workpiece.observe(dict.fromkeys(norms, add), "finding directions")
    _, vectors = torch.linalg.eigh(sums.double())
    return vectors.flip(1)[:, :count].float().contiguous()


def _strongest(workpiece: Workpiece, norms: Mapping[str, list[str]], count: int) -> "torch.Tensor":
    """Return the channels that the layers after the norms get most from, as columns of the identity [d, count]."""
    import torch

    width = workpiece.config.hidden_size
    powers = {name: torch.zeros(width) for name in norms}
    epsilon = float(workpiece.config.rms_norm_eps)

    def see(power: torch.Tensor) -> Any:
        return lambda rows: power.add_(rms_normalized(rows, epsilon).square().sum(0))

    workpiece.observe({name: see(power) for name, power in powers.items()}, "choosing channels")
    scores = torch.zeros(width, dtype=torch.float64)
    for name, readers in norms.items():
        scale = workpiece.read(f"{name}.weight").double()
        gains = sum(workpiece.read(f"{reader}.weight").double().square().sum(0) for reader in readers)
        parts = powers[name].double() * scale.square() * gains
        scores += parts / parts.sum()
    return torch.eye(width)[:, torch.from_numpy(largest(scores, count))].contiguous()


def _cut(
    workpiece: Workpiece,
    changes: Mapping[str, Any],
    norms: Mapping[str, list[str]],
    basis: "torch.Tensor",
    moments: "Mapping[str, Moments]",
) -> None:
    """Fold the norms' scales into their readers, and let everything see x basis in place of x."""
    import torch

    family = workpiece.family
    base = workpiece.model.base_model_prefix
    tied = workpiece.config.tie_word_embeddings and changes.get("tie_word_embeddings", True)
    replaced = {f"{base}.embed_tokens.weight": workpiece.read(f"{base}.embed_tokens.weight") @ basis}
    for norm, readers in norms.items():
        scale = workpiece.read(f"{norm}.weight")
        replaced[f"{norm}.weight"] = torch.ones(basis.shape[1])
        if readers == ["lm_head"] and tied:
            replaced[f"{norm}.weight"] = moments[norm].rescale(scale, basis.argmax(0))
            replaced["lm_head.weight"] = replaced[f"{base}.embed_tokens.weight"]
            continue
        for reader in readers:
            replaced[f"{reader}.weight"] = moments[norm].refit(workpiece.read(f"{reader}.weight") * scale, basis)
    for index in range(workpiece.num_blocks):
        for part in (family.attention_output, family.mlp_output):
            name = workpiece.block_name(index, part)
            replaced[f"{name}.weight"] = basis.T @ workpiece.read(f"{name}.weight")
            if workpiece.block(index, part).bias is not None:
                replaced[f"{name}.bias"] = basis.T @ workpiece.read(f"{name}.bias")
    workpiece.cut(changes, lambda *_: None, replaced)
