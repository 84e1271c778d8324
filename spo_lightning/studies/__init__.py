"""Experiments small enough to be exact: no language model.

In come losses and solvers as they are, and policies or quadratics of a few numbers; out come files
that show what theory says beside what was measured. This room may not know of tokens, of
Lightning, or of a real model.
"""
