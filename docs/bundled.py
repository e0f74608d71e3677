"""Write the page of the bundled posteriors, bundled.md, from their cards; with `--pictures`, draw their pictures too.

python docs/bundled.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURES = DOCS / "images" / "bundled"
METRICS = {
    "accuracy": "accuracy",
    "miou": "mIoU",
    "rmse": "RMSE",
    "nll": "NLL",
    "ece": "ECE",
    "coverage_0.9": "90 % intervals cover",
}
HEAD = """# Bundled posteriors

These come with the package: `zoo.load(NAME)` needs no network. The page is made from their cards by
`python docs/bundled.py`. Metrics are those of the test data; a baseline is the same network trained without a
posterior. [Results](results.md) says how they were measured, `bayeslayers verify NAME` measures them again, and
`bayeslayers info NAME` prints the whole card.
"""


def page() -> str:
    """Return the page."""
    import zoo
    from bayeslayers.storage.posterior import read_card

    return HEAD + "".join(_section(read_card(zoo.resolve(name))) for name in sorted(zoo.list_posteriors()))


def _section(card: Any) -> str:
    baseline = str(card.baseline.get("optimizer", ""))
    names = {name: METRICS.get(name) or f"OOD AUROC, {name.removeprefix('ood_auroc_')}" for name in _shown(card)}
    columns = "".join(f" {title} |" for title in names.values())
    rows = [("posterior", card.metrics), *([(f"baseline: {baseline}", card.baseline)] if baseline else [])]
    lines = [f"| {title} |" + "".join(f" {_number(name, row.get(name))} |" for name in names) for title, row in rows]
    return (
        f"\n## {card.name}\n\n"
        f"![What {card.name} predicts](images/bundled/{card.name}.png)\n\n"
        f'`zoo.load("{card.name}")`: network `{card.builder}`, data {card.dataset}, trained by '
        f"`{card.optimizer['name']}`, likelihood {card.likelihood}, "
        f"inputs {tuple(card.input_size)}, licence {card.license}.\n\n| |{columns}\n|---|{'---|' * len(names)}\n"
        + "\n".join(lines)
        + "\n"
    )


def _shown(card: Any) -> list[str]:
    """Return the names of the metrics on the page: the usual ones, and detection of OOD data by entropy."""
    ood = [name for name in card.metrics if name.startswith("ood_auroc_") and not name.endswith("_epistemic")]
    return [name for name in METRICS if name in card.metrics] + ood


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name in ("accuracy", "miou") else f"{value:.3g}"


def draw() -> None:
    """Draw what each posterior predicts for examples of its test data, from a fixed seed."""
    import torch
    from pages import compact

    import bayeslayers as bl
    import zoo
    from recipes.data.slices import load_slice

    PICTURES.mkdir(exist_ok=True)
    for name in zoo.list_posteriors():
        model = zoo.load(name)
        card = zoo.card_of(model)
        data = load_slice(card.dataset.split()[0], card.input_size)
        generator, path = torch.Generator().manual_seed(0), PICTURES / f"{name}.png"
        if card.likelihood == "gaussian":
            _intervals(model, data, generator, path)
        elif card.input_size == [2]:
            bl.plots.decision_boundary(
                model, data.x[:200], data.labels[:200], generator=generator, class_names=card.class_names, path=path
            )
        elif len(card.input_size) == 1:
            examples = data.inputs(slice(None)), data.targets
            bl.plots.reliability_diagram(bl.evaluate(model, examples, generator=generator), path)
        elif "camvid" in card.dataset:
            images = data.images[:2].float() / 255
            prediction = bl.predict(model, images, 8, generator=generator)
            bl.plots.segmentation_panels(
                images, data.labels[:2], prediction, class_names=card.class_names, ignore_index=255, path=path
            )
        else:
            images = data.images[:8].float() / 255
            names = [text.split(" - ")[-1] for text in card.class_names]
            groups = {card.dataset.split()[0]: images, "turned by a quarter": images.rot90(1, (2, 3))}
            rows = [(title, x, bl.predict(model, x, 32, generator=generator)) for title, x in groups.items()]
            bl.plots.predictive_panels(rows, names, path)
        compact(path, path)


def _intervals(model: Any, data: Any, generator: Any, path: Path) -> None:
    """Draw a regression: bands over a single input, else predictions and their 90 % intervals against targets."""
    import torch

    import bayeslayers as bl

    if data.x.shape[1] == 1:
        grid = torch.linspace(float(data.x.min()), float(data.x.max()), 300)[:, None]
        bl.plots.regression_bands(grid, bl.predict(model, grid, generator=generator), data.x, data.labels, path=path)
        return
    from matplotlib.figure import Figure

    prediction = bl.predict(model, data.x, generator=generator)
    low, high = prediction.quantile([0.05, 0.95])
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    y, mean = data.labels.flatten(), prediction.mean.flatten()
    errors = torch.stack([mean - low.flatten(), high.flatten() - mean]).numpy()
    axis.errorbar(y.numpy(), mean.numpy(), errors, fmt="o", ms=3, lw=1, color="#0072B2", label="mean, 90 % interval")
    ends = [float(y.min()), float(y.max())]
    axis.plot(ends, ends, "--", color="black", lw=1, label="equal")
    axis.set(xlabel="target", ylabel="prediction")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    if "--pictures" in sys.argv:
        draw()
    (DOCS / "bundled.md").write_text(page())
