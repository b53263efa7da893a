"""Objectives: what a model is trained for.

Every file defines `Options`, `DEFAULTS` and `prepare(job, options)`, which reads the data, loads the model, and returns
an `Objective` (see `llmfast.tune.objective`).
"""
