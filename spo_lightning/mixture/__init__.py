"""A diffusion model in the plane, whose likelihood can be computed, in; what preference training
on a bound does to the likelihood itself, beside what the bound says of it, out.

``truth.py`` is the data and the preference, both known in closed form, ``likelihood.py`` the exact
log-density of any denoiser, ``training.py`` a method that trains one by the surrogate of
``diffusion/``, ``measures.py`` what is compared, and ``study.py`` all of it in order.

Letters for shapes: N points, D numbers of each (two), B pairs.
"""
