"""Before training: what an objective would do to pairs.

In comes the configuration of a run; out come its pairs' geometry, a pilot of a few real steps on
weights that are put back, and what follows from these. This room may not write into a run's
directory, nor move a policy for good.
"""
