"""Laplace approximations: a posterior for a network that is already trained, from one pass over the data."""

from bayeslayers.laplace.evidence import best_prior_precision
from bayeslayers.laplace.fit import LaplaceFit, laplace

__all__ = ["LaplaceFit", "best_prior_precision", "laplace"]
