"""The neural processor of a Qualcomm Snapdragon through QNN's plugin, beside plain onnxruntime."""

from typing import Any

NAME = "QNNExecutionProvider"
PLUGIN_PACKAGE = "onnxruntime_qnn"
INSTALL = "pip install onnxruntime-qnn"
NEEDS = "it takes the neural processor of a Snapdragon"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
SLOW: dict[tuple[str, str], str] = {}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options; the device is chosen before."""
    return {}


def is_fit(device: Any) -> bool:
    """Return whether a device of ONNX Runtime's list is this provider's."""
    return bool(device.ep_name == NAME)
