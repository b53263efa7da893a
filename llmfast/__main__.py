"""`python -m llmfast`."""

import os
import sys

# `python -m` looks for every module in the current directory first: a `torch.py` of a model's folder must not be run.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from llmfast.cli import main

main()
