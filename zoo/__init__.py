"""The model zoo: networks of Bayesian layers by name, and trained posteriors of them."""

from zoo import alexnet, lenet, mlp, resnet, segmentation, vgg  # noqa: F401  the families register their networks
from zoo.hub import search
from zoo.posteriors import download, list_posteriors, load, publish, resolve
from zoo.registry import card_of, create, list_models
from zoo.transforms import transforms

__all__ = [
    "card_of",
    "create",
    "download",
    "list_models",
    "list_posteriors",
    "load",
    "publish",
    "resolve",
    "search",
    "transforms",
]
