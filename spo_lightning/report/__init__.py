"""Files of runs to what a person looks at.

In come run directories, sweeps and their tables, or what inspect found, as plain JSON; out come
one page, tables and figures. It reads files and no objects, so a run of another version or on
another machine can be shown. This room may not know of a model, of training, or how a number was
computed.
"""
