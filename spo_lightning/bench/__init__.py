"""What a step, a run and a start cost, each measured beside something else.

In comes a shape of data and what is to be compared on it; out come times and memory, taken in
turns within one run of the command, and a table. This room may not know of a loss's or a solver's
insides: it takes the steps that a run would take. One file per question, chosen by ``what``.
"""
