"""The report of an evaluation: one HTML file that loads nothing, with its pictures inside."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from torch import Tensor

from bayeslayers import Evaluation, plots
from bayeslayers.display import printable
from bayeslayers.files import write_atomically
from bayeslayers.plots.canvas import rendered
from recipes.reports.measure import EvaluationResult, Picture, Section
from recipes.reports.metrics import is_headline, meaning, score_in_words
from recipes.training.run_folder import REPORT

REPORT_HTML = "report.html"
CORRUPTIONS = "corruptions.png"
_THUMBNAIL = 112  # pixels along the longer side


def report_html(result: EvaluationResult) -> str:
    """Return the report as one HTML document, which loads nothing from anywhere.

    Args:
        result: What was measured.
    """
    request, evaluation = result.request, result.evaluation
    figures = Section("Figures", pictures=_figures(evaluation))
    sections = [figures, *_corrupted(result), *_training(result), *result.sections]
    return _template().render(
        title=f"{request.posterior} on {request.data}",
        evaluation=evaluation,
        weights=_weights(request.method, evaluation.num_samples),
        seed=request.seed,
        headline={key: value for key, value in evaluation.metrics.items() if is_headline(key)},
        sections=[section for section in sections if section.text or section.pictures],
        command=result.command,
        versions=result.versions,
    )


def write_report(result: EvaluationResult, folder: str | Path) -> None:
    """Write `report.html`, `report.json`, and `corruptions.png` where there are any, each whole or not at all.

    Args:
        result: What they show.
        folder: Made if there is none.
    """
    contents = {REPORT_HTML: report_html(result).encode(), REPORT: result.to_json().encode()}
    if result.evaluation.corruptions is not None:
        contents[CORRUPTIONS] = rendered(plots.corruption_boxes({result.request.posterior: result.evaluation}))
    for name, content in contents.items():
        write_atomically(Path(folder) / name, content)


@cache
def _template() -> Template:
    """Return the template, which makes every text of a file printable and escapes it."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "breakable": _breakable, "source": _source}
    environment.globals["meaning"] = meaning
    return environment.get_template("report.html.j2")


def _shown(value: Any) -> Any:
    """Return a value as an expression of the template shows it: text without what is not printable."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.6f}"


def _breakable(key: str) -> Markup:
    """Return a name that may go on in the next line after a slash or an underscore."""
    return Markup(str(escape(printable(key))).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _figures(evaluation: Evaluation) -> list[Picture]:
    """Return the pictures that an evaluation has data for."""
    pictures = []
    if evaluation.reliability is not None:
        text = "Bars on the dashed line are calibrated: of what is said with 80 % confidence, 80 % is right."
        pictures.append(Picture(plots.reliability_diagram(evaluation), "Reliability diagram", [[text]]))
    if evaluation.risk_coverage is not None:
        text = "Refuse the least confident predictions, from right to left, and fewer of the others are wrong."
        pictures.append(Picture(plots.risk_coverage_curve(evaluation), "Risk-coverage curve", [[text]]))
    for score in ("entropy", "variance", "epistemic") if evaluation.ood else ():
        if score in evaluation.scores:
            words = score_in_words(score, discrete=evaluation.likelihood != "gaussian")
            text = f"OOD examples should lie further right than known examples by {words}."
            pictures.append(Picture(plots.score_histograms(evaluation, score), f"Known and OOD by {score}", [[text]]))
    return pictures


def _corrupted(result: EvaluationResult) -> Sequence[Section]:
    evaluation = result.evaluation
    if evaluation.corruptions is None:
        return []
    text = "Severity 1 is the weakest. A good posterior loses confidence as it loses accuracy: its ECE stays low."
    boxes = Picture(plots.corruption_boxes(evaluation), "Quality of corrupted images", [[text]])
    return [Section("Corrupted images", pictures=[boxes], layout="wide")]


def _training(result: EvaluationResult) -> Sequence[Section]:
    if not result.log:
        return []
    text = "Metrics of the training data are means over an epoch, while the weights moved."
    if (asked := result.epoch_request) is not None:
        text += f" The others were measured after each epoch, by {_weights(asked.method, asked.num_samples)}."
    curves = Picture(plots.training_curves(result.log), "Training curves", [[text]])
    return [Section("Training", pictures=[curves], layout="wide")]


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


def _source(picture: Picture) -> str:
    """Return a picture as the source of an element; one of bytes `(c, h, w)` made smaller if need be."""
    image = picture.image
    png = _thumbnail(image) if isinstance(image, Tensor) else rendered(image, dpi=130)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _thumbnail(image: Tensor) -> bytes:
    from PIL import Image

    picture = Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()
