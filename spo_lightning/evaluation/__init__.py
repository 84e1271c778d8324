"""A policy and held-out rows to numbers.

In come log-probabilities and answers; out come sums and counts, and from them the numbers that
training, evaluation and reports share. They are computed here once, so that no loss can misreport
its margin. This room may not know of a solver, of training, or of where its numbers are shown.
"""
