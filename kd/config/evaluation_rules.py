"""Rules for an evaluation, which is a run of no steps: trainer.steps=0, as python -m kd.evaluate types it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig

# Settings of training, and of what is made for it. A group stands for all settings below it.
OF_TRAINING = (
    "seed", "lm", "push_to_hub", "method", "lr", "optim", "adapter", "rollout", "record", "trainer.batch",
    "trainer.clip", "trainer.log_every", "trainer.val_every", "trainer.checkpoint_every", "trainer.keep",
    "trainer.patience",
)  # fmt: skip


def unused_in_evaluation(word: str, name: str) -> UserError | None:
    """Return the error for an override that only training reads; None for another one. name: that of the override."""
    if name not in OF_TRAINING and name.partition(".")[0] not in OF_TRAINING:
        return None
    why, hint = "would do nothing, as nothing is trained", f"leave {name} out"
    return UserError(option=word, conflict="trainer.steps=0", why=why, hint=hint)


def check_evaluation(config: ExperimentConfig) -> None:
    """Refuse an evaluation of a student without weights, and one that would train something first."""
    if not config.is_evaluation:
        return
    refused = UserError(option="trainer.steps", got=0, why="nothing is trained")
    if not config.student.name:
        hint = "type student=hub student.name=NAME_OR_FOLDER, or trainer.steps=1 or more"
        raise refused.replace(conflict=f"student={config.student.size}", need="a student with weights", hint=hint)
    if config.start.stage != "scratch":
        raise refused.replace(conflict=f"start={config.start.stage}", hint="type start=scratch")
    if config.logits.source.distils:
        hint = "type logits=none; a teacher beside it is compared with"
        raise refused.replace(conflict=f"logits={config.logits.source}", hint=hint)
    if config.teacher.size or config.teacher.sft:
        conflict = "teacher.sft=true" if config.teacher.sft else f"teacher={config.teacher.size}"
        hint = "type teacher=none, or teacher=hub teacher.name=NAME_OR_FOLDER"
        raise refused.replace(conflict=conflict, need="a teacher with weights", hint=hint)
