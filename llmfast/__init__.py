"""Make Transformers small and fast on ONNX Runtime, with proof."""

import os

__version__ = "0.1.0"

# Libraries read these when they are imported, so they are set before any of them can be.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
