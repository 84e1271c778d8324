"""A batch of pairs to moved parameters and logged numbers.

In come scored pairs, a loss and a solver; out comes a policy trained in place, under Lightning.
One module serves every loss and every solver: it computes F and G, follows the direction that the
solver gives, and knows neither by name. This room may not know of a command, or where pairs are
from.
"""
