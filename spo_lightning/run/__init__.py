"""The stages of a run, in order.

In comes a configuration; out comes a run directory with its model and numbers. A stage takes one
record and gives the next, and the commands are lists of stages. This room may not know of a sweep,
of another run, or of the page that is made of it.
"""
