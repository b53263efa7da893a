"""NVIDIA GPUs through CUDA."""

NAME = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime, then pip install 'llmfast[cuda]' on a machine with an NVIDIA GPU"
DISABLED_OPTIMIZERS = ()


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options for one GPU."""
    return {"device_id": str(device)}
