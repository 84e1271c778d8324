"""Stable Preference Optimization: preference losses above, supervised fine-tuning below.

The rooms, in the order data flows: ``data`` -> ``models`` -> ``losses`` -> ``solvers`` ->
``module`` -> ``callbacks`` and ``evals`` -> ``train`` -> ``report``.
"""

__version__ = "0.2.0"
