"""Rollout: the text that a step learns from."""

from __future__ import annotations

from kd.data.batches import Batch
from kd.rollout.samplers import Samplers


class Rollout:
    """Text of the data. Other rollouts write some of it anew.

    write() returns a batch with new responses, sampled with the options `how`, in at most the share `sampling_rate` of
    the steps. The functions that build rollouts (kd/rollout/strategies.py) declare the TokenInfo of every batch.
    """

    sampling_rate = 0.0
    validate_before_training = False  # on_validation() is called before the first step, too

    def __init__(self, samplers: Samplers | None, **how):
        self._samplers, self.how = samplers, how

    @property
    def samplers(self) -> Samplers:
        """Models that write; a rollout that is only planned has none."""
        assert self._samplers is not None, "this rollout was built to be planned"
        return self._samplers

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        """Return the batch of a step, at which the share `progress` of the run is done."""
        return self.write(batch)

    def write(self, batch: Batch) -> Batch:
        """Return the batch with new responses, where there are any."""
        return batch

    def on_validation(self, loss: float) -> None:
        """Take the result of a validation: the student's loss on the references, nats per token."""

    def state(self) -> dict:
        """Return tensors and numbers that a checkpoint keeps for load()."""
        return {}

    def is_rank_local(self, state: dict) -> bool:
        """Return True if a state() holds text that one rank alone has."""
        return bool(state)

    def load(self, state: dict) -> None:
        """Go on from a state()."""
