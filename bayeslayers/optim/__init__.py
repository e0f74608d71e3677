"""Optimisers of the posterior: each writes the (mean, precision) pairs of a model's Bayesian layers."""

from bayeslayers.optim.schedules import TemperatureSchedule, TemperatureWarmup, lr_warmup
from bayeslayers.optim.vogn import OGN, VOGN

__all__ = ["OGN", "VOGN", "TemperatureSchedule", "TemperatureWarmup", "lr_warmup"]
