"""What a policy can still do, beyond the held-out rows.

In come a policy, a file of prompts and names of tasks; out come numbers, and a value per prompt,
so that a policy before and after training is compared on the same ones. This room may not know of
training, nor who asks.
"""
