"""ONNX Runtime's own CPU kernels."""

NAME = "CPUExecutionProvider"
INSTALL = "pip install 'llmfast[cpu]'"
# Its SkipLayerNormalization takes ten times as long as Add and LayerNormalization: without the fusion an int8
# MiniLM is 1.27 times as fast, a float one 1.14 times (8 x 128 tokens, onnxruntime 1.32, AVX512). BiasGelu takes longer
# than Add and Gelu.
DISABLED_OPTIMIZERS = ("SkipLayerNormFusion", "BiasGeluFusion")
# One-thread runs beside each other are no slower than one run of all threads, see `llmfast.batch_session`.
RUNS_ROWS_APART = True
# (scheme, activations) -> what to use instead.
SLOW: dict[tuple[str, str], str] = {}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options; the CPU has no device number and needs none."""
    return {}
