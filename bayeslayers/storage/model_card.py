"""The model card of a posterior, README.md beside its weights: Markdown with the Hub's metadata."""

from __future__ import annotations

import json
import math
import re

from bayeslayers.display import printable
from bayeslayers.storage.card import Card

_PLAIN = re.compile(r"[A-Za-z_]([\w./() ,+-]*[\w)])?", re.ASCII)  # text that YAML needs no quotes for
_NOT_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # which YAML 1.1 reads as something else


def model_card(card: Card) -> str:
    """Return the README.md of a posterior: the Hub's front matter, how to use it, and how it was trained."""
    images = len(card.input_size) != 1
    facts = {
        "network": f"`{card.builder}` {json.dumps(card.kwargs)}" if card.builder else "the author's own",
        "images": f"resized to {card.resize}, then cropped to the centre" if card.resize else "",
        "data": card.dataset,
        "optimiser": json.dumps(card.optimizer) if card.optimizer else "",
        "temperature": card.temperature,
        "trained by": f"`{card.recipe}`" if card.recipe else "",
    }
    lines = [f"- {key}: {value}" for key, value in facts.items() if value not in ("", None)]
    inputs = "images" if images else "x"
    how = "" if card.method == "sample" else f', method="{card.method}"'
    name = json.dumps(card.name, ensure_ascii=False)
    if card.base_model:
        load = (
            f"import bayeslayers as bl\n\nmodel = ...  # {printable(card.base_model)} with its adapters\n"
            f"bl.load_adapters({name}, model)"
        )
    elif card.builder:
        load = f"import bayeslayers as bl, zoo\n\nmodel = zoo.load({name})"
    else:
        load = f"import bayeslayers as bl\n\nmodel = ...  # the author's own network\nbl.load_posterior({name}, model)"
    return (
        f"---\n{_front_matter(card, images)}\n---\n\n# {card.name}\n\n"
        f"A Gaussian posterior over the weights of a network: means and precisions.\n\n```python\n{load}\n"
        f"prediction = bl.predict(model, {inputs}, num_samples=64{how})\n```\n\n"
        + "\n".join(lines)
        + f"\n\n{_metrics_table(card)}{card.notes}\n"
    )


def _front_matter(card: Card, images: bool) -> str:
    """Return the metadata that the Hub reads, in YAML: that of `huggingface_hub.ModelCardData`, without the package."""
    lines = ["library_name: bayeslayers"]
    lines += [f"license: {_yaml(card.license)}"] if card.license else []
    lines += [f"base_model: {_yaml(card.base_model)}"] if card.base_model else []
    metrics = {key: card.metrics[key] for key in ("accuracy", "nll", "ece") if card.dataset and key in card.metrics}
    lines += [] if metrics else [f"model_name: {_yaml(card.name)}"]
    lines += ["tags:", "- bayesian", "- uncertainty", "- variational-inference"]
    if not metrics:
        return "\n".join(lines)
    lines += ["model-index:", f"- name: {_yaml(card.name)}", "  results:"]
    lines += ["  - task:", f"      type: {'image' if images else 'tabular'}-classification", "    dataset:"]
    lines += [f"      name: {_yaml(card.dataset)}", f"      type: {_yaml(card.dataset.partition(' ')[0].lower())}"]
    lines += ["    metrics:"]
    for key, value in metrics.items():
        lines += [f"    - type: {key}", f"      value: {_yaml(value)}"]
    return "\n".join(lines)


def _yaml(value: str | float) -> str:
    """Return a scalar of YAML 1.1: plain where its text cannot be read as anything else, quoted otherwise."""
    if not isinstance(value, str):
        text = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan" if value != value else repr(value))
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


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
