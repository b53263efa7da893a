"""Running a model: prefill and decode over one KV cache, sampling, stop strings."""
