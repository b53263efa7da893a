"""`llmfast doctor`."""

from llmfast.commands._options import Format, check_format

SUMMARY = "What this machine can run: cores, memory, providers, extras."


def doctor(output_format: Format = "table") -> None:
    """Say what this machine has, and which providers work: a small graph is run on each.

    Example: llmfast doctor
    """
    check_format(output_format)
    from llmfast.doctor.stage import doctor as run
    from llmfast.doctor.table import print_document

    print_document(run().document(), output_format)
