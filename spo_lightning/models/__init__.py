"""Batches of tokens to log-probabilities, and prompts to answers.

In comes a checkpoint or an architecture, then a ``PairBatch``; out comes ``PairLogps``, one
log-probability per token of an answer. A policy is loaded, adapted, asked and saved here, and
nothing else touches logits. This room may not know of a loss, a solver, or where a batch is from.
"""
