"""Pairs of images and a denoiser in, the two numbers per pair that losses and solvers take out.

An image has no log-probability that could be read off a model. In its place stands how well the
denoiser tells what noise was added to it: ``objective.py`` says by which formula, ``scorer.py``
computes it, and from there on an image is an answer like any other.
"""
