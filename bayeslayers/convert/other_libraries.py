"""Layers of libraries that are not imported for it: known by the module and the name of their class."""

from __future__ import annotations

from torch import nn

from bayeslayers.convert.reroute import bayesian_subclass
from bayeslayers.layers import BayesianLayer, BayesScaledConv2d, BayesStandardisedConv2d, BayesTransposedLinear

_CLASSES: dict[tuple[str, str], type[BayesianLayer]] = {
    ("transformers.pytorch_utils", "Conv1D"): BayesTransposedLinear,
    ("timm.layers.std_conv", "StdConv2d"): BayesStandardisedConv2d,
    ("timm.layers.std_conv", "StdConv2dSame"): BayesStandardisedConv2d,
    ("timm.layers.std_conv", "ScaledStdConv2d"): BayesScaledConv2d,
    ("timm.layers.std_conv", "ScaledStdConv2dSame"): BayesScaledConv2d,
}


def bayesian_class_of(kind: type[nn.Module]) -> type[BayesianLayer] | None:
    """Return the Bayesian version of another library's class of layers, None if that is not known.

    Args:
        kind: The class.
    """
    bayesian = _CLASSES.get((kind.__module__, kind.__name__))
    return None if bayesian is None else bayesian_subclass(kind, kind, bayesian)
