"""Trackers that a run reports to while it goes: TensorBoard, Weights & Biases, MLflow."""

from fedalt.tracking.reporter import Reporter

__all__ = ["Reporter"]
