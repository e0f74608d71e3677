"""What a metric is, by the form of its name: the sentences of a report."""

from __future__ import annotations

import re

_SCORES = {
    "confidence": "the confidence",
    "entropy": "the entropy of the prediction",
    "epistemic": "the epistemic uncertainty",
    "variance": "the variance of the prediction",
}
_OF_CLASSES = {"epistemic": "the mutual information of class and weights"}
_MEANING = {
    r"accuracy": "Share of examples whose most probable class is right. Higher is better.",
    r"nll": "Negative log-likelihood: surprise at the true value, in nats. Lower is better.",
    r"mixture_nll": "Negative log-likelihood under the mixture of all samples, in nats. Lower is better.",
    r"brier": "Squared distance of the probabilities to the truth, from 0 to 2. Lower is better.",
    r"ece": "Expected calibration error: how far confidence is from accuracy, in 15 equal bins. Lower is better.",
    r"adaptive_ece": "The calibration error in bins of equally many examples. Lower is better.",
    r"classwise_ece": "The calibration error of every class's probability, averaged over classes. Lower is better.",
    r"misclassification_auroc_(?P<score>\w+)": "Chance that {score} ranks an error as less certain than a right "
    "prediction; 0.5 is a guess. Higher is better.",
    r"misclassification_fpr95_(?P<score>\w+)": "Share of right predictions flagged where {score} flags 95 % of the "
    "errors. Lower is better.",
    r"aurc": "Area under the risk-coverage curve: the error rate averaged over how much is kept. Lower is better.",
    r"coverage_at_risk_(?P<risk>[\d.]+)": "Largest share of examples that can be kept with an error rate of at most "
    "{risk}. Higher is better.",
    r"corrupted_accuracy": "Accuracy of corrupted images, averaged over kinds and severities. Higher is better.",
    r"corrupted_nll": "Negative log-likelihood of corrupted images, averaged likewise. Lower is better.",
    r"corrupted_ece": "Calibration error of corrupted images, averaged likewise. Lower is better.",
    r"miou": "Intersection over union, averaged over classes. Higher is better.",
    r"rmse": "Root mean squared error, in the target's units. Lower is better.",
    r"crps": "Continuous ranked probability score, in the target's units. Lower is better.",
    r"coverage_(?P<level>[\d.]+)": "Share of targets in the central interval of level {level}; best at that level.",
    r"(?P<set>.+)/auroc_(?P<score>\w+)": "Chance that {score} ranks an example of “{set}” as less certain than a known "
    "example; 0.5 is a guess. Higher is better.",
    r"(?P<set>.+)/fpr95_(?P<score>\w+)": "Share of known examples flagged where {score} flags 95 % of “{set}”. Lower "
    "is better.",
}
_HEADLINE = re.compile(
    "(corrupted_)?(accuracy|nll|ece)|mixture_nll|brier|aurc|miou|rmse|crps|misclassification_auroc_confidence"
    "|.+/auroc_(entropy|epistemic|variance)"
)


def meaning(key: str, *, discrete: bool = True) -> str:
    """Return one line on what a metric is, empty for one that is not known.

    Args:
        key: Its name.
        discrete: Whether targets are classes, whose epistemic uncertainty is a mutual information.

    >>> meaning("coverage_at_risk_0.05")
    'Largest share of examples that can be kept with an error rate of at most 0.05. Higher is better.'
    """
    for form, text in _MEANING.items():
        if found := re.fullmatch(form, key):
            words = found.groupdict()
            return text.format(**words | {"score": score_in_words(words.get("score", ""), discrete)})
    return ""


def score_in_words(score: str, discrete: bool = True) -> str:
    """Return what a score of uncertainty is; nothing for one that is not known."""
    return (_SCORES | (_OF_CLASSES if discrete else {})).get(score, "")


def is_headline(key: str) -> bool:
    """Return whether a metric stands at the top of a report."""
    return _HEADLINE.fullmatch(key) is not None
