"""Plots of posteriors, predictions and training, in colours that colour-blind readers can distinguish.

Each function returns a new figure without touching `pyplot` state. If a path is given, it also writes the figure
atomically, as PNG, SVG or PDF according to the suffix.
"""

from bayeslayers.plots.continual import accuracy_matrix, forgetting_curves
from bayeslayers.plots.corruption import corruption_boxes
from bayeslayers.plots.functions import decision_boundary, regression_bands
from bayeslayers.plots.panels import predictive_panels, segmentation_panels
from bayeslayers.plots.quality import (
    accuracy_by_confidence,
    reliability_diagram,
    risk_coverage_curve,
    score_histograms,
)
from bayeslayers.plots.training import signal_to_noise, training_curves, training_gif

__all__ = [
    "accuracy_by_confidence",
    "accuracy_matrix",
    "corruption_boxes",
    "decision_boundary",
    "forgetting_curves",
    "predictive_panels",
    "regression_bands",
    "reliability_diagram",
    "risk_coverage_curve",
    "score_histograms",
    "segmentation_panels",
    "signal_to_noise",
    "training_curves",
    "training_gif",
]
