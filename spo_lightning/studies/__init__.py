"""Softmax policies over a few answers: where the package's losses and solvers are exact."""
