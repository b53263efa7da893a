"""Encoder-decoder architectures of the direct route: one file, one `model_type`.

Every file defines `TASK`, what such a model is for when its checkpoint does not say, and
`describe(config) -> EncoderDecoder`.
"""
