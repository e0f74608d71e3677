"""Metrics of predictions: likelihood, calibration, ranking by uncertainty, regression, and of sequences of tasks.

Running sums process one batch after the other, so that memory holds bins, or one number per example, but never
all probabilities. The tests compare them with torchmetrics, whose calibration error and AUROC keep every example.
"""

from bayeslayers.metrics.calibration import CalibrationBins, Reliability, adaptive_calibration_error
from bayeslayers.metrics.classification import ClassificationRecord, classification_metrics
from bayeslayers.metrics.continual import average_accuracy, backward_transfer
from bayeslayers.metrics.corrupted import CorruptionMetrics
from bayeslayers.metrics.ranking import Levels, RiskCoverage, ScoreHistogram, ood_auroc
from bayeslayers.metrics.regression import RegressionRecord, gaussian_crps, gaussian_nll

__all__ = [
    "CalibrationBins",
    "ClassificationRecord",
    "CorruptionMetrics",
    "Levels",
    "RegressionRecord",
    "Reliability",
    "RiskCoverage",
    "ScoreHistogram",
    "adaptive_calibration_error",
    "average_accuracy",
    "backward_transfer",
    "classification_metrics",
    "gaussian_crps",
    "gaussian_nll",
    "ood_auroc",
]
