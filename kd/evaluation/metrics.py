"""Validation metrics.

All use the full distributions at temperature 1, so that runs with different training targets are comparable.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from kd.config import plugins
from kd.evaluation import catalog
from kd.objective.chunked import Signal, chunks, default_chunk_size, log_probabilities
from kd.objective.target import Target

BINS = 15  # of confidence; Guo et al. 2017


def agreement(student: Tensor, target: Target) -> Tensor:
    """1 where student and teacher rank the same token first, else 0 [N]."""
    return (student.argmax(-1) == target.logp.argmax(-1)).float()


def against_teacher() -> dict[str, Callable[[Tensor, Target], Tensor]]:
    """Return the functions of the metrics per token by name; raise UserError for one of a plug-in that has none."""
    return {metric.name: _function(metric.function) for metric in catalog.metrics() if metric.function}


def _function(target: str) -> Callable[[Tensor, Target], Tensor]:
    """Return the function that a metric names."""
    if plugins.plugin_of(target):
        return plugins.load(target, "the metric")
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def calibration_bins(logp: Tensor, label: Tensor) -> Tensor:
    """Return [BINS, 3] for log-probabilities [N, V]: positions, sum of confidence, and correct ones, by confidence."""
    confidence, best = logp.max(-1)
    return _binned(confidence.exp(), best == label)


def bins_by_teacher(student: Tensor, target: Target) -> Tensor:
    """Return calibration bins [BINS, 3] with the teacher as the truth.

    The student's first choice counts as correct with the teacher's probability of it. This is for the student's own
    text, whose tokens cannot be the truth: they are drawn with the student's confidence.
    """
    confidence, best = student.max(-1)
    return _binned(confidence.exp(), target.logp.gather(-1, best[:, None])[:, 0].exp())


def _binned(confidence: Tensor, correct: Tensor) -> Tensor:
    index = (confidence.double() * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, 3, dtype=torch.float64, device=confidence.device)
    columns = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence)], -1)
    return sums.index_add_(0, index, columns.double())


def calibration_error(bins: Tensor) -> float:
    """Expected calibration error: mean |accuracy - confidence| over bins. Guo et al. 2017, arXiv 1706.04599, eq. 3."""
    count, confidence, correct = bins.unbind(-1)
    return ((correct - confidence).abs().sum() / count.sum()).item()


class Measures:
    """Sums of all measures over a validation set; `result()` divides once, at the end."""

    def __init__(self, chunk: int | None = None):
        self.chunk = chunk
        self.functions = against_teacher()
        self.tokens: float = 0  # or the weight of sums that are means
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, head: torch.nn.Module, hidden: Tensor, label: Tensor, signal: Signal | None) -> None:
        """Add the positions of hidden [N, D], label [N], and the teacher's signal for them if there is one."""
        self.tokens += len(label)
        for rows in chunks(len(label), self.chunk or default_chunk_size(head)):
            student = log_probabilities(head, hidden[rows])
            self._add("lm", -student.gather(-1, label[rows, None]).double().sum())
            self._add("ece", calibration_bins(student, label[rows]))
            if signal is not None:
                target = signal(rows)
                assert target.ids is None  # measures are of whole distributions
                for name, measure in self.functions.items():
                    self._add(name, measure(student, target).double().sum())
                self._add("teacher_lm", -target.logp.gather(-1, label[rows, None]).double().sum())
                self._add("teacher_ece", calibration_bins(target.logp, label[rows]))

    def result(self) -> dict[str, float]:
        """Return means per token.

        Keys ending in `accuracy` are the share of tokens ranked first; keys ending in `ece` are calibration errors.
        Both lie in [0, 1].
        """
        means = {}
        for name, value in self.sums.items():
            if name.endswith("ece"):
                means[name.replace("ece", "accuracy")] = value[:, 2].sum().item() / self.tokens
                means[name] = calibration_error(value)
            else:
                means[name] = value.item() / self.tokens
        return means

    def add(self, tokens: float, sums: dict[str, Tensor]) -> None:
        """Merge sums from another rank."""
        self.tokens += tokens
        for name, value in sums.items():
            self._add(name, value)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value
