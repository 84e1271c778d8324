"""Files of runs in; a page, tables and pictures out. It reads run directories, tables of jobs and
the files of studies, and knows nothing else of ours.

A report goes through it in this order: ``__main__`` or ``build`` (directories), ``reading`` (a
record per run), ``settings`` (runs that differ in more than their seed), ``run_page`` or
``sweep_page`` (sections of tables, notes and ``charts``), ``page`` and its template (one file).
``paper``, ``evolution`` and ``quadratic`` draw what the docs show.
"""
