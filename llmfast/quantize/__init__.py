"""Quantization: number formats in `schemes`, ways to find the numbers in `transforms` and `rounding`."""
