"""The model card of a posterior, README.md beside its weights: Markdown with the Hub's metadata."""

from __future__ import annotations

import dataclasses
import json
import re

from bayeslayers.display import printable
from bayeslayers.storage.card import Card
from bayeslayers.storage.front_matter import front_matter, pipeline_tag
from bayeslayers.storage.weight_file import PICTURE

_MOST_SAMPLES = 1000
_TITLE = re.compile(r"^# (.*)$", re.M)


def model_card(card: Card, picture: bool = False) -> str:
    """Return the README.md of a posterior: the Hub's front matter, how to use it, and how it was trained.

    Args:
        card: The posterior's card. Where its name is that of a repository, "OWNER/REPO", the code loads it from there.
        picture: Show the file `picture.png` beside it.
    """
    facts = {
        "network": f"`{card.builder}` {json.dumps(card.kwargs)}" if card.builder else "the author's own",
        "images": f"resized to {card.resize}, then cropped to the centre" if card.resize else "",
        "data": card.dataset,
        "optimiser": json.dumps(card.optimizer) if card.optimizer else "",
        "temperature": card.temperature,
        "trained by": f"`{card.recipe}`" if card.recipe else "",
    }
    lines = [f"- {key}: {value}" for key, value in facts.items() if value not in ("", None)]
    shown = f"![Picture of {card.name}]({PICTURE})\n\n" if picture else ""
    return (
        f"---\n{front_matter(card)}\n---\n\n# {card.name}\n\n"
        f"A Gaussian posterior over the weights of a network: means and precisions.\n\n{shown}"
        f"```python\n{_code(card)}\n```\n\n" + "\n".join(lines) + f"\n\n{_metrics_table(card)}{card.notes}\n"
    )


def is_generated(text: str, card: Card) -> bool:
    """Return whether a README.md is as `model_card` wrote it, under any name, so that nobody's words are in it."""
    if (title := _TITLE.search(text)) is None:
        return False
    named = dataclasses.replace(card, name=title[1])
    return text in (model_card(named), model_card(named, picture=True))


def _code(card: Card) -> str:
    """Return code that loads the posterior and predicts; it runs as it is where the card names the network."""
    name = json.dumps(card.name, ensure_ascii=False)
    folder = f"zoo.download({name})" if "/" in card.name else name
    counted = card.metrics.get("num_samples")
    samples = counted if isinstance(counted, int) and 1 <= counted <= _MOST_SAMPLES else 64
    how = "" if card.method == "sample" else f', method="{card.method}"'
    predict = f"prediction = bl.predict(model, x, num_samples={samples}{how})"
    if card.base_model or not card.builder:
        load, whose = "load_posterior", "the author's own network"
        if card.base_model:
            load, whose = "load_adapters", f"{printable(card.base_model)} with its adapters"
        imports = "import bayeslayers as bl" + "\nimport zoo" * ("/" in card.name)
        return f"{imports}\n\nmodel = ...  # {whose}\nbl.{load}({folder}, model)\n{predict}"
    regression = card.likelihood == "gaussian"
    result = (
        "prediction.mean, prediction.quantile([0.05, 0.95])" if regression else "prediction.labels, prediction.total"
    )
    meaning = "means and 90 % intervals" if regression else "classes, and their uncertainty in nats"
    imports = "import torch\n\nimport bayeslayers as bl\nimport zoo"
    return f"{imports}\n\nmodel = zoo.load({name})\n{_inputs(card)}\n{predict}\nprint({result})  # {meaning}"


def _inputs(card: Card) -> str:
    """Return code that makes inputs of the right shape, in place of the user's own."""
    if not card.input_size:
        return "x = ...  # your inputs"
    shape = ", ".join(map(str, [2, *card.input_size]))
    if pipeline_tag(card) == "text-classification":
        words = card.kwargs.get("vocabulary")
        words = words if isinstance(words, int) else 2
        return f"x = torch.randint({words}, ({shape}))  # your sentences, as numbers of tokens"
    if len(card.input_size) == 3:
        return f"x = torch.rand({shape})  # your images, in [0, 1]; zoo.transforms(model) reads them from files"
    return f"x = torch.randn({shape})  # your inputs, one example a row"


def _metrics_table(card: Card) -> str:
    if not card.metrics:
        return ""
    other = str(card.baseline.get("optimizer", ""))
    header = f"| metric | this posterior | {other} |\n|---|---|---|\n" if other else "| metric | value |\n|---|---|\n"
    rows = [
        f"| {key} | {value:.6g} |" + (f" {card.baseline.get(key, '')} |" if other else "")
        for key, value in card.metrics.items()
    ]
    return header + "\n".join(rows) + "\n\n"
