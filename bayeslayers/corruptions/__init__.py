"""Corruptions of images, which show how a posterior predicts where data drifts away from that of its training.

Source: Hendrycks & Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations
(arXiv 1903.12261), whose kinds these are.
"""

from bayeslayers.corruptions.corrupt import KINDS, SEVERITIES, check_images, check_kinds, corrupt, corrupted_batches

__all__ = ["KINDS", "SEVERITIES", "check_images", "check_kinds", "corrupt", "corrupted_batches"]
