"""Write the page of the bundled posteriors, and the README.md of each, from their cards; `--pictures` draws too.

python docs/bundled.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURE = "picture.png"
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
`bayeslayers info NAME` prints the whole card. `bayeslayers publish --all --organisation OWNER` puts
all of them on the [Hub](hub.md).
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
        f"![What {card.name} predicts](../zoo/posteriors/{card.name}/{PICTURE})\n\n"
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
    from pages import compact

    import zoo
    from recipes.reports.card_picture import card_picture

    for name in zoo.list_posteriors():
        path = zoo.resolve(name) / PICTURE
        path.write_bytes(card_picture(zoo.load(name)) or b"")
        compact(path, path)


def write_cards() -> None:
    """Write each posterior's README.md from its card."""
    import zoo
    from bayeslayers.storage.model_card import model_card
    from bayeslayers.storage.posterior import read_card

    for name in zoo.list_posteriors():
        folder = zoo.resolve(name)
        (folder / "README.md").write_text(model_card(read_card(folder), picture=True))


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    if "--pictures" in sys.argv:
        draw()
    write_cards()
    (DOCS / "bundled.md").write_text(page())
