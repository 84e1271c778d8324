"""The sources of rows that are named in ``conf/data``, one per file.

In come the keys of a yaml; out comes a ``Task``: training rows, held-out rows, and how an answer
is judged where that can be told. A source may not know of tokens, of a model, or of a run.
"""
