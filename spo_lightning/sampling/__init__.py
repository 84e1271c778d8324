"""Preference data from a model's own answers: ``judges`` score them, ``strategies`` choose pairs,
``record`` keeps every answer so that a run that was stopped goes on. The command is ``sample.py``.
"""
