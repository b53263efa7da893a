"""Pruning: blocks, channels, heads and tokens out of a checkpoint; zeros into the weights of an ONNX graph."""
