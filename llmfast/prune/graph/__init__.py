"""What pruning the weights of an ONNX graph needs."""
