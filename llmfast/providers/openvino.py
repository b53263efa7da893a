"""Intel processors and graphics through OpenVINO's plugin, beside plain onnxruntime."""

from typing import Any

NAME = "OpenVINOExecutionProvider"
PLUGIN_PACKAGE = "onnxruntime_ep_openvino"
INSTALL = "pip install 'llmfast[openvino]'"
NEEDS = "it takes processors and graphics that Intel made"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
# Twice to three times as slow as static activations: every scale is found by nodes of its own.
SLOW = {("int8", "dynamic"): "quantize with --scheme int8 --activations static for openvino"}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options; the device is chosen before."""
    return {}


def is_fit(device: Any) -> bool:
    """Return whether a device of ONNX Runtime's list is this provider's, and the processor."""
    return bool(device.ep_name == NAME and device.ep_metadata.get("ov_device", "CPU") == "CPU")
