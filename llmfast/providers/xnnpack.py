"""The XNNPACK kernels, of ONNX Runtime builds that have them."""

NAME = "XnnpackExecutionProvider"
INSTALL = "build ONNX Runtime with --use_xnnpack: no wheel on PyPI has it"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
SLOW: dict[tuple[str, str], str] = {}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options."""
    return {}
