"""Optimisers of the posterior: each writes the (mean, precision) pairs of a model's Bayesian layers."""

from bayeslayers.optim.vogn import OGN, VOGN

__all__ = ["OGN", "VOGN"]
