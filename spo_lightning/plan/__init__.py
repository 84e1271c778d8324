"""A run's config in; its memory on a device, its disk and its time out, and no weights loaded.

``shape`` says what the model is, ``memory`` counts what its blocks hold, ``theta`` what a solver
does; ``sums`` adds up, ``changes`` looks for what takes less, ``__main__`` says it.
"""
