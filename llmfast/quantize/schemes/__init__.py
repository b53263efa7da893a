"""Schemes: number formats.

Every file defines `Options`, `grid(options)`, `needs_statistics(options)` and `make_writer(workpiece, options)`, which
returns what adds a layer's nodes. A plan may give any layer another grid than the scheme's: writers take every grid in
blocks, and `grid(options)`.
"""
