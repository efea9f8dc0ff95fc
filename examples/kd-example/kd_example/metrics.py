"""Metrics: student log-probabilities [N, V] and a Target -> a value per position [N]; their mean is logged."""

from torch import Tensor

from kd.evaluation.catalog import metric
from kd.objective.target import Target


@metric(label="entropy gap", plot="0 is as sure as the teacher")
def entropy_gap(student: Tensor, target: Target) -> Tensor:
    """Entropy of the student minus that of the teacher, nats per token."""
    return _entropy(student) - _entropy(target.logp)


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).nan_to_num().sum(-1)
