"""Schemes: number formats.

Every file defines `Options`, `grid(options)` and `write_linear(graph, linear, weight)`. A plan may give any layer
another grid than the scheme's: `write_linear` takes every grid in blocks, and `grid(options)`.
"""
