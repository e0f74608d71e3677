"""The model zoo: networks of Bayesian layers by name, and trained posteriors of them."""

from zoo import networks  # noqa: F401  which registers the builders
from zoo.hub import search
from zoo.loading import download, list_posteriors, load, publish, publish_all, resolve
from zoo.permutations import permutation
from zoo.registry import card_of, create, list_models
from zoo.transforms import transforms

__all__ = [
    "card_of",
    "create",
    "download",
    "list_models",
    "list_posteriors",
    "load",
    "permutation",
    "publish",
    "publish_all",
    "resolve",
    "search",
    "transforms",
]
