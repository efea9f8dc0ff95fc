"""Checkpoints that survive kill -9: written atomically with a digest beside them, verified before they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

from lightning.pytorch.callbacks import Callback

from kd.errors import UserError
from kd.models import adapters
from kd.parallel import collectives
from kd.runs.provenance import differences
from kd.runs.run import Run
from kd.system.checkpoint_files import FORMAT, steps
from kd.system.remote_checkpoints import RemoteCheckpoints
from kd.system.retries import SOON
from kd.system.signals import Preempted, requests
from kd.training.random_state import random_state, restore

KEPT = 2  # newest checkpoints: one to resume from, one in case it is damaged


class Checkpoints(Callback):
    """Checkpoints every `every` steps. The newest two are kept. A resumed run ends bit for bit as an undisturbed one.

    A checkpoint is saved at the start of a batch, after all work of the step before, validation included. So a resumed
    run does exactly the remaining work. Each checkpoint has the code of its run; a run of other code does not continue
    from it.

    before_save(step): writes the files that have to be on the disk before a checkpoint. before_send(seconds to wait):
    copies the files that have to be at the URL before it.
    """

    def __init__(
        self, run: Run, every: int, config: dict, code: dict, before_save: Callable[[int], None] | None = None,
        before_send: Callable[[float], None] | None = None,
    ):  # fmt: skip
        self.run, self.folder, self.every = run, run / "checkpoints", every
        self.copies = RemoteCheckpoints(run.remote) if run.remote else None
        self.config, self.code = config, {name: code[name] for name in ("sources", "origins")}
        self.before_save, self.before_send = before_save, before_send
        self.resumed_at = self.saved_at = -1
        self.random_state: dict | None = None  # step of the checkpoint that the run continues from
        self.step_start: dict = {}  # state that changes within a step before the weights

    def setup(self, trainer, module, stage) -> None:
        self.module = module
        module.end_unfinished_step = partial(self._end_unfinished_step, trainer)

    def state_dict(self) -> dict:
        """Return plain containers and tensors, so that they load with weights_only=True. All ranks have to call it."""
        rollout = self.module.rollout
        return {
            "code": self.code,
            "frozen": self.frozen_digest,
            "micro_batch_size": self.module.micro_batch_size,
            "random": collectives.all_gather(random_state(self.module.device)),
            "rollout": collectives.all_gather(rollout.state() if rollout else {}),
        }

    @cached_property
    def frozen_digest(self) -> str | None:
        """Return the digest of the weights that do not learn; None if all learn."""
        return adapters.frozen_digest(self.module)

    def load_state_dict(self, state: dict) -> None:
        if changed := differences(state["code"], self.code, self.config):
            raise UserError(
                option=self.run.name,
                why=f"was started with other code: that of {', '.join(changed)} has changed since its checkpoint",
                hint="to continue the run, restore that code. To train it anew with the code as it is, type this, and "
                "then the same command again",
                commands=[self.run.removal_command("checkpoints")],
            )
        if state.get("frozen") != self.frozen_digest:
            raise UserError(
                option=self.run.name,
                why="was started with other weights under its adapter, and its checkpoint has the adapter alone",
                hint="to continue the run, restore these weights. To train it anew with the weights as they are, type "
                "this, and then the same command again",
                commands=[self.run.removal_command("checkpoints")],
            )
        self.module.micro_batch_size = state["micro_batch_size"]
        self._load_rollout(state["rollout"])
        # With more ranks than there were, the new ones draw numbers of their own.
        states = state["random"]
        self.random_state = states[collectives.rank()] if collectives.rank() < len(states) else None

    def _load_rollout(self, states: list[dict]) -> None:
        """Restore the rollout of this rank from the states of all ranks of the checkpoint."""
        rollout = self.module.rollout
        if not rollout:
            return
        if len(states) != collectives.world_size() and any(map(rollout.is_rank_local, states)):
            raise UserError(
                option="trainer.devices",
                got=collectives.world_size(),
                why=f"the checkpoint is of {len(states)} processes, each of which keeps the responses that it wrote",
                need=f"{len(states)} processes to continue this run",
                hint=f"type trainer.devices={len(states)} on one machine, or as many processes on several",
            )
        rollout.load(states[min(collectives.rank(), len(states) - 1)])

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["format"] = FORMAT

    def on_train_start(self, trainer, module) -> None:
        self.resumed_at = trainer.global_step
        requests.watch()  # Lightning has put handlers of its own in their place

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        requested = collectives.any_rank(requests.pending)
        if trainer.global_step == self.resumed_at:
            if self.random_state is not None:  # only here, since what runs before draws from the generators
                restore(self.random_state, module.device)
                self.random_state = None
        elif trainer.global_step % self.every == 0 or requested:
            self._save(trainer, SOON if requested else 0)
        if requested:  # also where it was resumed at this very step, and there is nothing new to save
            self._finish(trainer)
            raise Preempted
        self.step_start = {
            "random": random_state(module.device),
            "rollout": module.rollout.state() if module.rollout else {},
            "lr": [group["lr"] for group in module.optimizers().param_groups],
        }

    def _end_unfinished_step(self, trainer) -> None:
        """Return to the start of an unfinished step, save that state, and end."""
        for group, lr in zip(self.module.optimizers().param_groups, self.step_start["lr"], strict=True):
            group["lr"] = lr
        if self.module.rollout:
            self.module.rollout.load(self.step_start["rollout"])
        restore(self.step_start["random"], self.module.device)
        if trainer.global_step not in (self.resumed_at, self.saved_at):
            progress = trainer.fit_loop.epoch_loop.batch_progress
            for counts in (progress.current, progress.total):
                counts.started = counts.ready - 1  # as before the step
            self._save(trainer, SOON)
        self._finish(trainer)
        raise Preempted

    def _save(self, trainer, wait: float) -> None:
        """Save a checkpoint. wait: seconds for a URL that is away."""
        for logger in trainer.loggers:
            logger.save()  # metrics from before a checkpoint are not measured again
        if self.before_save:
            self.before_save(trainer.global_step)
        path = self.folder / f"step-{trainer.global_step:08}.ckpt"
        trainer.save_checkpoint(path)
        if self.copies and collectives.rank() == 0:
            self.copies.send(path, self.before_send, getattr(trainer.strategy, "writing", None), wait)
        for old in steps(self.folder)[KEPT:]:
            trainer.strategy.remove_checkpoint(old)
        self.saved_at = trainer.global_step

    def on_train_end(self, trainer, module) -> None:
        self._finish(trainer)

    def _finish(self, trainer) -> None:
        if hasattr(trainer.strategy, "finish_writing"):
            trainer.strategy.finish_writing()
        if self.copies:
            self.copies.finish_sending()
