"""Decoder architectures of the direct route: the file `<model_type>.py` says where one departs from Llama.

A description is `describe(config) -> Decoder`. It reads the `transformers` config; a field that it does
not read and that is not at its default is refused, so that nothing is left out unnoticed.
"""
