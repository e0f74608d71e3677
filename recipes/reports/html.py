"""The report of an evaluation: one HTML file that loads nothing, with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bayeslayers import plots
from bayeslayers.display import printable
from bayeslayers.files import write_atomically
from bayeslayers.plots.canvas import rendered
from recipes.reports.measure import EvaluationResult, Mistake
from recipes.training.run_folder import REPORT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THUMBNAIL = 112  # pixels along the longer side
_SCORES = {
    "confidence": "the confidence",
    "entropy": "the entropy of the prediction",
    "epistemic": "the mutual information of class and weights",
}
# What a metric is, by the form of its name.
_MEANING = {
    r"accuracy": "Share of examples whose most probable class is right. Higher is better.",
    r"nll": "Negative log-likelihood: surprise at the true class, in nats. Lower is better.",
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
    r"(?P<set>.+)/auroc_(?P<score>\w+)": "Chance that {score} ranks an example of “{set}” as less certain than a known "
    "example; 0.5 is a guess. Higher is better.",
    r"(?P<set>.+)/fpr95_(?P<score>\w+)": "Share of known examples flagged where {score} flags 95 % of “{set}”. Lower "
    "is better.",
}
_HEADLINE = re.compile("accuracy|nll|brier|ece|aurc|misclassification_auroc_confidence|.+/auroc_(entropy|epistemic)")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --paper: #fff; --card: #f4f6f8; --line: #d8dee4;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --paper: #15181b; --card: #1f2429;
  --line: #363d45; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem .45rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; color: var(--accent);
  white-space: nowrap; }
td.meaning { color: var(--soft); font-size: .875rem; }
figure { margin: 0; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.figures figure, .mistakes figure, .wide figure { background: var(--card); border-radius: .5rem; padding: .75rem; }
.figures img, .wide img { width: 100%; height: auto; display: block; background: #fff; border-radius: .25rem;
  margin: 0 0 .5rem; }
.mistakes { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.mistakes img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; background: #000;
  border-radius: .25rem; }
.mistakes b { color: var(--ink); }
pre { background: var(--card); border-radius: .5rem; padding: .75rem; white-space: pre-wrap; margin: .4rem 0; }
summary { cursor: pointer; color: var(--accent); margin: .8rem 0; }
@media (max-width: 36rem) { thead { display: none; } tr { display: grid; grid-template-columns: 1fr auto;
  border-bottom: 1px solid var(--line); padding: .4rem 0; } td { border: 0; padding: .1rem .3rem .1rem 0; }
  td.meaning { grid-column: 1 / -1; } }
"""


def report_html(result: EvaluationResult) -> str:
    """Return the report as one HTML document, which loads nothing from anywhere.

    Args:
        result: What was measured.
    """
    request, evaluation = result.request, result.evaluation
    metrics = evaluation.metrics
    weights = _weights(request.method, evaluation.num_samples)
    headline = {key: value for key, value in metrics.items() if _HEADLINE.fullmatch(key)}
    title = f"{request.posterior} on {request.data}"
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{evaluation.num_examples:,} examples, predicted by {weights}, seed {request.seed}.</p>',
        _table(headline),
        f"<details><summary>All {len(metrics)} metrics</summary>{_table(metrics)}</details>",
        "<h2>Figures</h2>",
        f'<div class="figures">{"".join(_figures(result))}</div>',
        _training(result),
        _mistakes(result.mistakes),
        "<h2>How it was made</h2>",
        f"<pre>{escape(result.command)}</pre>",
        f'<p class="soft">{escape(versions)}. The same metrics for programs are in report.json.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # What a browser is to load, should a name ever slip through as markup: nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        "'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def write_report(result: EvaluationResult, folder: str | Path) -> None:
    """Write `report.html` and `report.json`, each whole or not at all.

    Args:
        result: What they show.
        folder: Made if there is none.
    """
    contents = {"report.html": report_html(result), REPORT: result.to_json()}
    for name, content in contents.items():
        write_atomically(Path(folder) / name, content.encode())


def escape(text: str) -> str:
    """Return text, wherever it came from, as HTML that shows it and does nothing else."""
    return html.escape(printable(text))


def meaning(key: str) -> str:
    """Return one line on what a metric is, empty for one that is not known.

    >>> meaning("coverage_at_risk_0.05")
    'Largest share of examples that can be kept with an error rate of at most 0.05. Higher is better.'
    """
    for form, text in _MEANING.items():
        if found := re.fullmatch(form, key):
            words = found.groupdict()
            return text.format(**words | {"score": _SCORES.get(words.get("score", ""), "")})
    return ""


def _table(metrics: dict[str, float]) -> str:
    rows = (
        f'<tr><td>{_breakable(key)}</td><td class="number">{_number(value)}</td>'
        f'<td class="meaning">{escape(meaning(key))}</td></tr>'
        for key, value in metrics.items()
    )
    head = "<thead><tr><th>metric</th><th>value</th><th>what it is</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _number(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.6f}"


def _breakable(key: str) -> str:
    """Return a name that may go on in the next line after a slash or an underscore."""
    return escape(key).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _figures(result: EvaluationResult) -> list[str]:
    evaluation, figures = result.evaluation, []
    if evaluation.reliability is not None:
        text = "Bars on the dashed line are calibrated: of what is said with 80 % confidence, 80 % is right."
        figures.append(_figure(plots.reliability_diagram(evaluation), "Reliability diagram", text))
    if evaluation.risk_coverage is not None:
        text = "Refuse the least confident predictions, from right to left, and fewer of the others are wrong."
        figures.append(_figure(plots.risk_coverage_curve(evaluation), "Risk-coverage curve", text))
    for score in ("entropy", "epistemic") if evaluation.ood else ():
        text = f"OOD examples should lie further right than known examples by {_SCORES[score]}."
        figures.append(_figure(plots.score_histograms(evaluation, score), f"Known and OOD by {score}", text))
    return figures


def _training(result: EvaluationResult) -> str:
    if not result.log:
        return ""
    text = "Metrics of the training data are means over an epoch, while the weights moved."
    if (asked := result.epoch_request) is not None:
        text += f" The others were measured after each epoch, by {_weights(asked.method, asked.num_samples)}."
    figure = _figure(plots.training_curves(result.log), "Training curves", text)
    return f'<h2>Training</h2><div class="wide">{figure}</div>'


def _weights(method: str | None, draws: int) -> str:
    """Return by which weights was predicted.

    >>> _weights("dropout", 64)
    'the means of the weights, with 64 draws of dropout'
    """
    drawn = f"{draws} draw{'s' * (draws > 1)} of"
    return {
        "mean": "the means of the weights",
        "moments": "the moments of the activations, in one pass",
        "local": f"{drawn} the activations",
        "linearised": f"{drawn} the outputs, linear in the weights",
        "dropout": f"the means of the weights, with {drawn} dropout",
    }.get(method or "sample", f"{drawn} the weights")


def _figure(figure: Figure, title: str, text: str) -> str:
    image = _source(rendered(figure, dpi=130))
    return f'<figure><img alt="{escape(title)}" src="{image}"><figcaption>{escape(text)}</figcaption></figure>'


def _mistakes(mistakes: list[Mistake]) -> str:
    if not mistakes:
        return '<h2>Mistakes</h2><p class="soft">None: every example is predicted rightly.</p>'
    shown = "".join(
        f'<figure><img alt="example" src="{_thumbnail(mistake.image)}"><figcaption>predicted '
        f"<b>{escape(mistake.predicted)}</b> ({mistake.confidence:.0%})<br>is <b>{escape(mistake.label)}</b>"
        "</figcaption></figure>"
        for mistake in mistakes
    )
    return f'<h2>The most confident mistakes</h2><div class="mistakes">{shown}</div>'


def _thumbnail(image: Tensor) -> str:
    """Return an image of bytes `(c, h, w)`, made smaller if need be, as the source of an element."""
    from PIL import Image

    picture = Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return _source(stream.getvalue())


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
