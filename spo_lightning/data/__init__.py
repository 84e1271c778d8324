"""Rows of text to batches of tokens.

In come a source (``tasks``, or a file of pairs) and a tokenizer; out comes a ``Task`` of checked
rows, then token pairs with a count of every dropped one, then a ``PairBatch``. This room may not
know of a model's weights, of a loss, or of how a batch is scored.
"""
