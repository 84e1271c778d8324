"""Rounds of answers, verdicts, pairs and training, each from where the last one ended.

In comes the config of a run and of its loop; out come a run directory of ``train`` per round, the
pairs beside it, and a page of them all. ``loop`` walks; what a loop asks and how answers become
pairs are functions that its yaml names (``judged``, ``spin``). This room may not know how a run
trains: it calls the stages that the commands call.
"""
