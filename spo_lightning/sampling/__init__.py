"""A policy and a judge to pairs.

In come prompts, a policy that answers them and scores of its answers; out come pairs of rows, and
token pairs from them. Answers are kept as they are drawn, so that a stopped run goes on. This room
may not know which loss is trained on its pairs.
"""
