"""What is not computed twice.

In comes what was computed, under a name made of all that it depends on; out comes the same, to any
run that asks by that name: token ids, and log-probabilities under the reference. A damaged file is
made anew. This room may not know of a loss, a rate, a seed, or the run that asks.
"""
