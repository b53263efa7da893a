"""Transforms: change weights and activations so that rounding hurts less, and leave the function as it is.

Every file defines `Options` and `transform(sites, statistics, read, rescaling, options)`.
"""
