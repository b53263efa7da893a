"""Transforms: change weights and activations so that rounding hurts less, and leave the function as it is.

Every file defines `NEEDS_STATISTICS`, `Options` and `transform(workpiece, options)`, which adds to `workpiece.edits`.
"""
