"""A run's config in; its memory on a device, its disk and its time out, and no weights loaded.

``shape`` imagines the model, ``memory`` has the run's own forward and backward go by on it,
``sums`` adds up, ``__main__`` says it.
"""
