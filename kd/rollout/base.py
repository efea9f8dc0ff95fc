"""Base class of rollouts, which provide the text that a step learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd.config.decorators import Function, declare
from kd.data.batches import Batch
from kd.rollout.samplers import Samplers

TRAITS = (
    "writes_all",  # every response is sampled, so that prompts alone suffice as data
    "by_teacher",  # the teacher writes every response, once and before training
)


def traits(*names: str, **needed: Any) -> Callable[[Function], Function]:
    """Declare properties of a rollout. The rules of configs read them without an import, so all values are literals.

    needed: values of the rollout's settings without which they do not hold.
    """
    return declare("traits", names, TRAITS)


class Rollout:
    """Rollout that returns the text of the data. Subclasses replace some of its responses.

    write() returns a batch with new responses, sampled with the options `sampling`. It is called in a share of the
    steps, at most `sampling_rate`. The functions that build rollouts (kd/rollout/strategies.py) declare the TokenInfo
    of every batch.
    """

    sampling_rate = 0.0
    validate_before_training = False  # True: on_validation() is also called before the first step

    def __init__(self, samplers: Samplers | None, **sampling):
        self._samplers, self.sampling = samplers, sampling

    @property
    def samplers(self) -> Samplers:
        """Models that generate text. A rollout that is only planned has none."""
        assert self._samplers is not None, "this rollout was built to be planned"
        return self._samplers

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        """Return the batch of a step. progress: share of the run that is done at this step."""
        return self.write(batch)

    def write(self, batch: Batch) -> Batch:
        """Return the batch with new responses, if this rollout samples any."""
        return batch

    def on_validation(self, loss: float) -> None:
        """Take the result of a validation: the student's loss on the references, nats per token."""

    def state(self) -> dict:
        """Return the tensors and numbers that a checkpoint keeps for load()."""
        return {}

    def is_rank_local(self, state: dict) -> bool:
        """Return True if a state() holds text that only one rank has."""
        return bool(state)

    def load(self, state: dict) -> None:
        """Continue from a state()."""
