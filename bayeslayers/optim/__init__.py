"""Optimisers of the posterior: each writes the (mean, precision) pairs of a model's Bayesian layers."""

from bayeslayers.optim.bbb import BBB
from bayeslayers.optim.ivon import IVON
from bayeslayers.optim.kfac import KFAC, NoisyKFAC
from bayeslayers.optim.schedules import TemperatureSchedule, TemperatureWarmup, lr_warmup
from bayeslayers.optim.swag import SWAG
from bayeslayers.optim.vogn import OGN, VOGN

__all__ = [
    "BBB",
    "IVON",
    "KFAC",
    "OGN",
    "NoisyKFAC",
    "SWAG",
    "VOGN",
    "TemperatureSchedule",
    "TemperatureWarmup",
    "lr_warmup",
]
