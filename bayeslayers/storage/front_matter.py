"""The metadata at the head of a model card, in YAML, by which the Hub lists, filters and links a posterior."""

from __future__ import annotations

import math
import re

from bayeslayers.storage.card import Card

_PLAIN = re.compile(r"[A-Za-z_]([\w./() ,+-]*[\w)])?", re.ASCII)  # text that YAML needs no quotes for
_NOT_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # which YAML 1.1 reads as something else
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_METRICS = {"accuracy": "accuracy", "miou": "mean_iou", "rmse": "rmse", "nll": "nll", "ece": "ece"}  # the Hub's names
_HUB_DATA = {
    "mnist": "ylecun/mnist",
    "permuted-mnist": "ylecun/mnist",
    "split-mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
}


def pipeline_tag(card: Card) -> str:
    """Return the Hub's name of what a posterior's network does; empty where the Hub has none, or the card is silent.

    >>> pipeline_tag(Card(input_size=[3, 32, 32])), pipeline_tag(Card(input_size=[8], likelihood="gaussian"))
    ('image-classification', 'tabular-regression')
    """
    builder, regression = card.builder or "", card.likelihood == "gaussian"
    if builder.startswith("text_"):
        return "text-classification"
    if len(card.input_size) == 1:
        return "tabular-regression" if regression else "tabular-classification"
    if len(card.input_size) != 3 or regression:
        return ""
    segments = "miou" in card.metrics or builder.startswith(("smp:", "unet", "segnet"))
    return "image-segmentation" if segments else "image-classification"


def data_name(card: Card) -> str:
    """Return the short name of a card's data set, without the numbers of its examples."""
    return card.dataset.partition(" ")[0].lower()


def hub_dataset(card: Card) -> str:
    """Return the repository of a card's data set on the Hub; empty where none is known.

    >>> hub_dataset(Card(dataset="cifar10 (50000 train, 8000 test)")), hub_dataset(Card(dataset="blobs"))
    ('uoft-cs/cifar10', '')
    """
    given = card.dataset.partition(" ")[0]
    return given if _HUB_ID.fullmatch(given) else _HUB_DATA.get(data_name(card), "")


def tags(card: Card) -> list[str]:
    """Return a posterior's tags: the subject, then its network, its data set and its method.

    >>> tags(Card(builder="timm:resnet18", dataset="cifar10 (9 train)", optimizer={"name": "IVON"}))[3:]
    ['resnet18', 'cifar10', 'ivon']
    """
    network = (card.builder or "").rpartition(":")[2].partition("/")[0]
    own = [network, data_name(card), str(card.optimizer.get("name", "")), "laplace" * ("laplace" in card.optimizer)]
    found = ["bayesian", "uncertainty", "variational-inference", *(tag.lower() for tag in own)]
    return [tag for tag in dict.fromkeys(found) if _TAG.fullmatch(tag)]


def front_matter(card: Card) -> str:
    """Return the metadata of a card, that of `huggingface_hub.ModelCardData` without the package."""
    task, data = pipeline_tag(card), hub_dataset(card)
    shown = {theirs: card.metrics[ours] for ours, theirs in _METRICS.items() if ours in card.metrics}
    metrics = shown if card.dataset and task else {}
    lines = [f"base_model: {_yaml(card.base_model)}"] if card.base_model else []
    lines += ["datasets:", f"- {_yaml(data)}"] if data else []
    lines += ["library_name: bayeslayers"]
    lines += [f"license: {_yaml(card.license)}"] if card.license else []
    lines += [] if metrics else [f"model_name: {_yaml(card.name)}"]
    lines += [f"pipeline_tag: {task}"] if task else []
    lines += ["tags:", *(f"- {_yaml(tag)}" for tag in tags(card))]
    if not metrics:
        return "\n".join(lines)
    lines += ["model-index:", f"- name: {_yaml(card.name)}", "  results:"]
    lines += ["  - task:", f"      type: {task}", "    dataset:"]
    lines += [f"      name: {_yaml(card.dataset)}", f"      type: {_yaml(data or data_name(card))}", "    metrics:"]
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
