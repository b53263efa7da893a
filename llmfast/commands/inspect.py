"""`llmfast inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from llmfast.commands._options import Format, check_format

SUMMARY = "What is in a model, and what is slow in it."


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Bundle, directory with model.onnx, or .onnx file.")],
    output_format: Format = "table",
) -> None:
    """Describe a model: layers, number formats, inputs, cache, lineage, and the forms that make it slow.

    Weights are not read; any .onnx file will do, whoever made it.

    Example: llmfast inspect int4
    """
    check_format(output_format)
    from llmfast.inspect.stage import inspect as run
    from llmfast.inspect.table import print_document

    print_document(run(model).document(), output_format)
