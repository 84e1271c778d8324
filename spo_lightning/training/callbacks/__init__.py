"""What watches a running ``Preference`` module, one callback per file; none changes it.

In come the module and the step it has taken; out come more numbers of that step, files of a
callback's own, a checkpoint, or the wish to stop. A callback may not change a parameter, the
solver's state, or a stream of random numbers.
"""
