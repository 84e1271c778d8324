"""Every architecture of transformers, built small: how this package reads it, in one table.

``python -m spo_lightning.models.architectures`` writes ``docs/models.md``.
"""
