"""Rounding: the codes and scales of a weight.

Every file defines `NEEDS_STATISTICS`, `Options` and `quantize_weight(weight, grid, options)`; where statistics
are needed, `quantize_weight(weight, grid, options, statistics, name)` with those of the layer's input, and
`Options.sequential`: whether they are measured on the layers quantized so far.
"""
