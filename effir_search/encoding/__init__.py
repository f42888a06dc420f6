"""Texts into vectors: the one forward pass, and the batching around it.

What comes in are texts and a model folder; what goes out are float32 vectors, a row a text, in the order of the texts.
Open ``encoder.py`` first: ``Encoder.from_pretrained`` and ``Encoder.encode``. What an index and its searches must agree
on is ``config.EncoderConfig``.
"""
