"""Rounding: the codes and scales of a weight.

Every file defines `NEEDS_STATISTICS`, `Options` and `quantize_weight(weight, grid, options, statistics)`,
where statistics are those of the layer's input, or None when the method needs none.
"""
