"""GPUs of any maker on Windows, through DirectML."""

NAME = "DmlExecutionProvider"
INSTALL = "pip uninstall onnxruntime, then pip install onnxruntime-directml on Windows"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
SLOW: dict[tuple[str, str], str] = {}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options."""
    return {"device_id": str(device)}
