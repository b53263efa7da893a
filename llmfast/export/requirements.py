"""The packages that exporting needs and a machine that only runs models does without."""

import importlib.util

from llmfast.errors import UnsupportedError

# `requests` is imported by optimum, which does not declare it.
_PACKAGES = ("torch", "transformers", "optimum", "onnxscript", "safetensors", "requests")


def require_export_extra() -> None:
    """Check that the packages of the `export` extra are there, without importing them.

    Raises:
        UnsupportedError: the first one that is missing.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(
                f"exporting needs `{package}`, which is not installed", "pip install 'llmfast[export]'"
            )
