"""Apple devices through CoreML."""

NAME = "CoreMLExecutionProvider"
INSTALL = "pip install 'llmfast[cpu]' on macOS, whose wheel has it"
DISABLED_OPTIMIZERS = ()
RUNS_ROWS_APART = False
SLOW: dict[tuple[str, str], str] = {}


def provider_options(device: int) -> dict[str, str]:
    """Return the provider's options."""
    return {}
