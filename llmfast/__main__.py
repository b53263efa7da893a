"""`python -m llmfast`."""

from llmfast.cli import main

main()
