"""Checkpoints whose linear layers are integer codes already: GPTQ, AWQ and compressed-tensors, taken over exactly.

All three keep `(code - zero_point) * scale` with groups along the input features, as MatMulNBits does; only the order
of the bits differs. Codes, scales and zero points are repacked, nothing is rounded again.
Sources: GPTQ, https://github.com/ModelCloud/GPTQModel (int32 words along K, zero points along N, stored minus one in
format `gptq`); AWQ, https://github.com/casper-hansen/AutoAWQ (int32 words along N, interleaved);
compressed-tensors, https://github.com/vllm-project/compressed-tensors (`pack-quantized`, offset binary).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.errors import InputError, LlmfastError, UnsupportedError
from llmfast.graph.packed import BLOCK_SIZES, Grid, QuantizedWeight, largest_block_size

_SUPPORTED = "4 or 8 bit weights by GPTQ (no act-order), AWQ (gemm) and compressed-tensors (pack-quantized)"
# AWQ's words hold the columns of a group of eight in this order.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


# Returns a layer's tensor in its own type, by its name without the layer's.
Read = Callable[[str], np.ndarray]
# Codes uint8 [N, K], scales [N, groups], zero points uint8 [N, groups].
_Codes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Packing:
    """How a checkpoint stores its linear layers.

    Attributes:
        method: `gptq`, `awq` or `compressed-tensors`.
        bits: width of a code, 4 or 8.
        group_size: input features that share a scale; -1 is all of them.
        symmetric: zero points are the middle of the codes.
        zero_offset: what is added to stored zero points.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int = 0

    @property
    def marker(self) -> str:
        """The tensor that a packed layer has, without the layer's name."""
        return "weight_packed" if self.method == "compressed-tensors" else "qweight"

    def describe(self) -> dict[str, Any]:
        """Return what the manifest's lineage holds."""
        return {"method": self.method, "bits": self.bits, "group_size": self.group_size}

    def stored_shape(self, rows: int, features: int) -> tuple[int, int]:
        """Return the shape of the marker of a layer of shape `(N, K)`."""
        per_word = 32 // self.bits
        if self.method == "gptq":
            return features // per_word, rows
        if self.method == "awq":
            return features, rows // per_word
        return rows, -(-features // per_word)

    def block_size(self, features: int) -> int:
        """Return the block size that MatMulNBits gets: a group may be several blocks with one scale.

        Raises:
            UnsupportedError: a group that no block size divides.
        """
        group = features if self.group_size == -1 else self.group_size
        sizes = BLOCK_SIZES[self.bits]
        block = group if group in sizes else largest_block_size(group)
        if group % block:
            raise UnsupportedError(f"groups of {group} weights are not supported", f"multiples of {min(sizes)} are")
        return block

    def unpack(self, read: Read) -> _Codes:
        """Return a layer's codes, scales and zero points.

        Raises:
            UnsupportedError: columns in an order that the kernel can't follow.
        """
        readers = {"gptq": self._unpack_gptq, "awq": self._unpack_awq, "compressed-tensors": self._unpack_compressed}
        return readers[self.method](read)

    def _unpack_gptq(self, read: Read) -> _Codes:
        codes = _unpack(read("qweight").T, self.bits)
        zeros = _unpack(read("qzeros"), self.bits).T[: len(codes)]
        group = codes.shape[1] if self.group_size == -1 else self.group_size
        if not np.array_equal(read("g_idx"), np.arange(codes.shape[1]) // group):
            raise UnsupportedError(
                "quantized with act-order: its columns need an index at run time",
                "use a checkpoint made with desc_act=False, or quantize the float one with `llmfast quantize`",
            )
        # Unsigned arithmetic on purpose: a stored zero point of 255 stands for 0 in 8 bits.
        return codes, read("scales").T, (zeros + np.uint8(self.zero_offset)) & np.uint8((1 << self.bits) - 1)

    def _unpack_awq(self, read: Read) -> _Codes:
        codes, zeros = (_deinterleave(_unpack(read(part), self.bits)).T for part in ("qweight", "qzeros"))
        return codes, read("scales").T, zeros

    def _unpack_compressed(self, read: Read) -> _Codes:
        rows, features = (int(size) for size in read("weight_shape"))
        codes = _unpack(read("weight_packed"), self.bits)[:, :features]
        scales = read("weight_scale")
        if self.symmetric:
            return codes, scales, np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        return codes, scales, _unpack(read("weight_zero_point").T, self.bits).T[:rows]


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer of codes in a checkpoint.

    Attributes:
        name: in the checkpoint.
        packing: how it is stored.
        tensor: returns one of its tensors.
    """

    name: str
    packing: Packing
    tensor: Read

    @property
    def has_half_scales(self) -> bool:
        """Whether float16 holds its scales exactly."""
        name = "weight_scale" if self.packing.method == "compressed-tensors" else "scales"
        return self.tensor(name).dtype == np.float16

    def read(self) -> QuantizedWeight:
        """Return its weight, in blocks of a size that MatMulNBits has.

        Raises:
            InputError: tensors that do not fit each other.
            UnsupportedError: columns in an order that the kernel can't follow.
        """
        try:
            codes, scales, zeros = self.packing.unpack(self.tensor)
        except LlmfastError as error:
            raise type(error)(f"weight `{self.name}`: {error.message}", error.hint) from error
        rows, features = codes.shape
        block, bits, symmetric = self.packing.block_size(features), self.packing.bits, self.packing.symmetric
        if len(scales) != rows or zeros.shape != scales.shape or features % scales.shape[1]:
            raise InputError(
                f"weight `{self.name}`: {rows} x {features} codes, but scales of {list(scales.shape)} and zero points "
                f"of {list(zeros.shape)}",
                "the checkpoint is damaged",
            )
        if symmetric and not (zeros == 1 << (bits - 1)).all():
            raise InputError(f"weight `{self.name}`: zero points that are not the middle, in a symmetric checkpoint")
        repeats = features // scales.shape[1] // block
        return QuantizedWeight(
            codes.reshape(rows, -1, block),
            np.repeat(scales.astype(np.float32), repeats, axis=1),
            None if symmetric else np.repeat(zeros, repeats, axis=1),
            Grid(bits, block, symmetric),
            features,
        )


def read_packing(settings: Mapping[str, Any], name: str) -> Packing:
    """Read `quantization_config` of a config.json.

    Args:
        settings: its contents.
        name: of the checkpoint, for messages.

    Raises:
        UnsupportedError: another method, or a form of it that the kernel can't compute.
    """
    method = settings.get("quant_method")
    try:
        packing = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[str(method)](settings)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UnsupportedError(
            f"`{name}` was quantized by `{method}` in a form that is not supported: {error}", f"supported: {_SUPPORTED}"
        ) from error
    if packing.bits not in (4, 8) or (packing.method == "awq" and packing.bits != 4):
        raise UnsupportedError(f"`{name}` has weights of {packing.bits} bits", f"supported: {_SUPPORTED}")
    return packing


def _gptq(settings: Mapping[str, Any]) -> Packing:
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return Packing("gptq", settings["bits"], settings["group_size"], bool(settings.get("sym", True)), offset)


def _awq(settings: Mapping[str, Any]) -> Packing:
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise KeyError(f"version {settings['version']}")
    bits, group = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    return Packing("awq", int(bits), int(group), symmetric=False)


def _compressed(settings: Mapping[str, Any]) -> Packing:
    if settings.get("format") != "pack-quantized":
        raise KeyError(f"format {settings.get('format')}")
    (group,) = settings["config_groups"].values()
    if group.get("input_activations") is not None:
        raise KeyError("quantized activations")
    weights = group["weights"]
    if weights.get("actorder") not in (None, "weight", "static"):
        raise KeyError(f"actorder {weights['actorder']}")
    size = weights.get("group_size") if weights["strategy"] == "group" else -1
    return Packing("compressed-tensors", weights["num_bits"], size or -1, bool(weights["symmetric"]))


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of int32 words `[rows, words]`, low bits first: uint8 [rows, words * 32 / bits]."""
    if words.dtype != np.int32:
        raise InputError(f"packed codes are {words.dtype}, not int32", "the checkpoint is damaged")
    octets = np.ascontiguousarray(words).view(np.uint8)  # little-endian, as safetensors stores them
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def _deinterleave(codes: np.ndarray) -> np.ndarray:
    by_word = codes.reshape(len(codes), -1, len(_AWQ_ORDER))
    columns = np.empty_like(by_word)
    columns[:, :, _AWQ_ORDER] = by_word
    return columns.reshape(codes.shape)
