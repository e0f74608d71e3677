"""Prediction by averaging over the posterior: by sampling, by moment propagation, or with the linearised network."""

from bayeslayers.prediction.linearised import linearised_moments, linearised_outputs
from bayeslayers.prediction.predict import predict
from bayeslayers.prediction.result import Prediction
from bayeslayers.prediction.window import SlidingWindow

__all__ = ["Prediction", "SlidingWindow", "linearised_moments", "linearised_outputs", "predict"]
