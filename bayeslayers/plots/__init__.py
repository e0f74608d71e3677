"""Pictures of posteriors, predictions and training, in colours that colour-blind readers tell apart.

Each function returns a figure that belongs to nobody else, so no `pyplot` state is touched, and writes it where
a path is given: PNG, SVG or PDF by its ending, whole or not at all.
"""

from bayeslayers.plots.functions import decision_boundary, regression_bands
from bayeslayers.plots.panels import predictive_panels, segmentation_panels
from bayeslayers.plots.quality import reliability_diagram, risk_coverage_curve, score_histograms
from bayeslayers.plots.training import signal_to_noise, training_curves, training_gif

__all__ = [
    "decision_boundary",
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
