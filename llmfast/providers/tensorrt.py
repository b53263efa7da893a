"""NVIDIA GPUs through TensorRT, which compiles the graph when the session opens."""

NAME = "TensorrtExecutionProvider"
INSTALL = "pip uninstall onnxruntime, then pip install 'llmfast[cuda]' tensorrt on a machine with an NVIDIA GPU"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
SLOW = {("int8", "dynamic"): "quantize with --scheme int8 --activations static for tensorrt"}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options."""
    return {"device_id": str(device)}
