"""What a pruning did, as rows for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmfast.bench.options import SPEED_RATIO
from llmfast.report import Column


def _factor(value: float) -> str:
    return f"{value:.2f}"


_COLUMNS = (
    Column("checkpoint", "checkpoint", align_right=False),
    Column("bundle", "bundle", align_right=False),
    Column("parameters", "num_parameters", "{:,}".format),
    Column("sparsity", "sparsity", "{:.4f}".format),
    Column("MB", "size_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("zipped MB", "zipped_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("MB", "weight_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("expected x", "expected_speedup", _factor),
    Column("expected prefill x", "expected_prefill_speedup", _factor),
    Column("expected decode x", "expected_decode_speedup", _factor),
    Column("perplexity", "perplexity", "{:.3f}".format),
    Column("ppl x", "perplexity_ratio", "{:.3f}".format),
    Column("KLD", "kld", "{:.4f}".format),
    Column("top-1 %", "top1_agreement", lambda value: f"{value * 100:.1f}"),
    Column("cosine", "cosine", "{:.5f}".format),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
    Column("relative error", "relative_error", "{:.4f}".format),
)
PLAN_COLUMNS = (
    Column("method", "method", align_right=False),
    Column("of", "of", align_right=False),
    Column("before", "before", "{:,}".format),
    Column("after", "after", "{:,}".format),
)
LAYER_COLUMNS = (
    Column("role", "role", align_right=False),
    Column("layers", "layers"),
    Column("parameters", "num_parameters", "{:,}".format),
    Column("sparsity", "sparsity", "{:.4f}".format),
)
NO_SPEEDUP = "no speed-up on ONNX Runtime; smaller only when compressed"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns of what is known of a model before and after; measured speeds come after the expected ones."""
    known = [key for row in rows for key in row]
    found = [column for column in _COLUMNS if column.key in known]
    speeds = [
        Column(
            f"measured {key.removesuffix('_ratio').replace('_tokens_per_s', '').replace('_per_s', '')} x", key, _factor
        )
        for key in dict.fromkeys(known)
        if SPEED_RATIO.fullmatch(key)
    ]
    place = 1 + max((index for index, column in enumerate(found) if "MB" in column.title or "expected" in column.title))
    return [*found[:place], *speeds, *found[place:]]
