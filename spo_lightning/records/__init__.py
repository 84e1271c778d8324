"""What a run leaves behind, and what is seen of it while it goes on.

In comes what happens: stages, numbers, errors, signals. Out come the files of a run directory, the
progress on the terminal and the rows of every logger; nothing else writes them. This room may not
know of a model, of data, or of how a number came about.
"""
