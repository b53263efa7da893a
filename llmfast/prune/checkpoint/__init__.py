"""What pruning a PyTorch checkpoint needs; with `prune.structured` the half that imports PyTorch."""
