"""Diagnosis: the state of a posterior, and what to do about it."""

from bayeslayers.diagnosis.diagnosis import Diagnosis, diagnose
from bayeslayers.diagnosis.findings import Finding
from bayeslayers.diagnosis.tensors import TensorDiagnosis

__all__ = ["Diagnosis", "Finding", "TensorDiagnosis", "diagnose"]
