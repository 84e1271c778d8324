"""Measured designs in, designs that should be better in every objective out.

Preference-guided diffusion (Annadani et al. 2025, 2503.17299): ``offline.py`` is what was
measured, ``order.py`` which of two designs is preferred, ``preference.py`` a classifier of that
order on noised pairs, ``guided.py`` draws designs along its gradient, ``surrogate.py`` is what
they are compared with, and ``study.py`` all of it in order. What designs look like, a net learns
that stands in ``studies``.

A design is a row of numbers in [-1, 1]; objectives are minimised.
"""
