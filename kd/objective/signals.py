"""Signals that an output layer makes from hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.objective.chunked import log_probabilities
from kd.objective.target import Target


@dataclass(frozen=True)
class ProjectedSignal:
    """Signal that applies an output layer to hidden states, only at the requested positions. It has no gradient."""

    head: torch.nn.Module
    features: Tensor  # [N, D]
    label: Tensor  # [N]
    seed: Tensor  # [N]

    def __call__(self, rows: slice) -> Target:
        with torch.no_grad():
            logp = log_probabilities(self.head, self.features[rows])  # [n, V]
        return Target(self.label[rows], logp, seed=self.seed[rows], complete=True)
