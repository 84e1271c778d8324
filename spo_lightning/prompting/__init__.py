"""Search for a system prompt: alignment without training (DRPO, Singla et al. 2411.08733).

In go questions, a start and who answers, judges and rewrites; out come the best prompt found, the
tree of those that were tried, and a log of every call.
"""
