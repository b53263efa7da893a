"""ONNX Runtime's own CPU kernels."""

NAME = "CPUExecutionProvider"
INSTALL = "pip install 'llmfast[cpu]'"


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options; the CPU has no device number and needs none."""
    return {}
