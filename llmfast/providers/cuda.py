"""NVIDIA GPUs through CUDA."""

NAME = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime, then pip install 'llmfast[cuda]' on a machine with an NVIDIA GPU"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
# It has no kernel for the integer products of scales found while it runs: they go back to the CPU, activations too.
SLOW = {("int8", "dynamic"): "quantize with --scheme int4 or fp16 for cuda"}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options for one GPU."""
    return {"device_id": str(device)}
