"""Options and checkpoints of the tests that prune."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from llmfast import registry
from llmfast.prune.options import PruneOptions
from llmfast.quantize.calibrate import Calibration

METHODS = registry.names("prune.structured")
CALIBRATION = Calibration(num_samples=6, seq_len=48)


def options_of(method: str, **choices: Any) -> PruneOptions:
    return PruneOptions(method, **({"calibration": CALIBRATION, "data_samples": 2} | choices))


def load_decoder(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
