"""Which of several answers is better.

In come rows and one answer to each; out comes a score per answer, higher is better, None where a
judge cannot tell. This room may not know what is made of the scores: pairs, or a win rate.
"""
