"""Schemes: number formats.

Every file defines `Options`, `grid(options)` and `write_linear(graph, linear, weight)`.
"""
