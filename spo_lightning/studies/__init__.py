"""Experiments small enough to be exact: no language model.

In come losses and solvers as they are, and policies or quadratics of a few numbers; out come files
that show what theory says beside what was measured. ``denoiser.py`` and ``fitting.py`` are the
small nets of ``design`` and ``mixture``, and how they are trained and gone on with. This room may
not know of tokens, of Lightning, or of a real model.
"""
