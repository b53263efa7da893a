"""`llmfast tune`: mixed-precision training of PyTorch checkpoints."""
