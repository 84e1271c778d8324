"""Stable Preference Optimization: preference losses above, supervised fine-tuning below.

The rooms, in the order data flows: ``errors`` -> ``config``, ``records`` -> ``data`` -> ``models``
-> ``losses``, ``solvers`` -> ``cache`` -> ``evaluation``, ``judges`` -> ``training`` ->
``sampling``, ``studies`` -> ``run`` -> ``sweep`` -> ``report``, ``bench`` -> the commands. A room
imports from the rooms before it and from no other.
"""

__version__ = "0.2.0"
