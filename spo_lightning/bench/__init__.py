"""What steps and runs cost, in time and memory.

In comes a question, ``what``, with its settings; out go bench.json, table.md and a picture.
A file per question (``step``, ``profile``, ``knobs``, ``solvers``, ``growth``, ``jobs``,
``start``) tells how it is answered. They share: ``asked`` (what may be asked, and our
configuration of it), ``cell`` (drawn pairs and a model), ``ours`` and ``contestants`` (who takes
the steps), ``measuring`` (clocks, memory, rounds), ``output`` (tables and figures). Nothing else
of the package may know this room, and only ``ours`` knows how a run is prepared.
"""
