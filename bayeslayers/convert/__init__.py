"""One-call conversion: which layers (selection), how (conversion, reroute), what became of each (report)."""

from bayeslayers.convert.conversion import register_rule, to_bayesian, to_deterministic
from bayeslayers.convert.report import ConversionReport
from bayeslayers.convert.selection import last_layer, norms

__all__ = ["ConversionReport", "last_layer", "norms", "register_rule", "to_bayesian", "to_deterministic"]
