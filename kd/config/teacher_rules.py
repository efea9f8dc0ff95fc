"""Rules for teachers: settings of a training that the teacher does not have, and fine-tuning that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig

# Settings of the run that trains a teacher: one of a size, or one by name with teacher.sft=true.
TRAINING = ("teacher.steps", "teacher.batch", "teacher.lr", "teacher.precision")


def unused_settings(
    size: object, name: object, fine_tuned: bool, cotrained: bool, writes_responses: bool
) -> tuple[str, ...]:
    """Return the settings teacher.… that have no effect.

    fine_tuned: teacher.sft. cotrained: the teacher learns beside the student. writes_responses: before training, drawn
    with teacher.seed.
    """
    if (size or (name and fine_tuned)) and not cotrained:
        return ()
    is_seeded = bool(cotrained and size) or bool(writes_responses and (size or name))
    return TRAINING if is_seeded else (*TRAINING, "teacher.seed")


def unused_by(config: ExperimentConfig) -> tuple[str, ...]:
    """Return the settings teacher.… that have no effect in a run."""
    teacher, cotrained = config.teacher, config.logits.source.trains_teacher
    return unused_settings(teacher.size, teacher.name, teacher.sft, cotrained, config.rollout.by_teacher)


def unused_setting(config: ExperimentConfig, word: str, name: str) -> UserError | None:
    """Return the error for an override teacher.… without an effect; None for another. name: that of the override."""
    if name not in unused_by(config):
        return None
    teacher, source = config.teacher, config.logits.source
    hint = f"leave {name} out"
    conflict = f"teacher.name={teacher.name}"
    if not teacher.exists:
        conflict, why = "teacher=none", "there is no teacher"
    elif name == "teacher.seed":
        why = "this teacher is pretrained, and writes no responses before training"
    elif source.trains_teacher:
        conflict = conflict if teacher.name else f"logits={source}"
        why = "a cotrained teacher has the steps, batches and rate of the run"
    else:
        why = "this teacher is pretrained"
        if config.data.is_instructions:
            hint += ", or type teacher.sft=true to fine-tune the teacher"
    return UserError(option=word, conflict=conflict, why=f"would do nothing, as {why}", hint=hint)


def check_teacher(config: ExperimentConfig) -> None:
    """Refuse to fine-tune a teacher that cannot be fine-tuned, or whose weights cannot be rounded."""
    _check_dtype(config)
    if not config.teacher.sft:
        return
    if not config.teacher.name:
        need, hint = "a teacher by name, as a size is always fine-tuned", "type teacher=hub teacher.name=…"
        raise UserError(option="teacher.sft", got=True, need=need, hint=hint)
    if not config.data.is_instructions:
        why = "needs instructions to fine-tune on, and this data is plain text"
        raise UserError(option="teacher.sft", got=True, why=why, hint="type data=instructions")
    if config.logits.source.trains_teacher:
        why, hint = "a cotrained teacher learns while the student does", "leave teacher.sft out"
        raise UserError(option="teacher.sft", got=True, conflict="logits=cotrained", why=why, hint=hint)


def _check_dtype(config: ExperimentConfig) -> None:
    """Refuse a dtype for the weights of a teacher that is not there, learns, or cannot be treated so."""
    dtype, trainer = config.teacher.dtype, config.trainer
    if dtype is None:
        return
    refused = UserError(option="teacher.dtype", got=dtype, hint="leave teacher.dtype out")
    if not config.teacher.exists:
        raise refused.replace(why="there is no teacher", hint="leave teacher.dtype out, or type e.g. teacher=1m")
    if config.logits.source.trains_teacher or config.logits.source.is_recorded:
        why = "the teacher learns, and its weights have to be whole"
        raise refused.replace(conflict=f"logits={config.logits.source}", why=why)
    if dtype == trainer.precision:
        raise refused.replace(conflict=f"trainer.precision={dtype}", why="would do nothing, as that is so already")
    if dtype in ("int8", "nf4") and trainer.shard_teacher:
        hint = "leave one of them out"
        why = "a teacher in shards has weights in floating point"
        raise refused.replace(conflict="trainer.shard_teacher=true", why=why, hint=hint)
    if dtype == "nf4" and trainer.compile is True:
        hint = "leave trainer.compile out, or type teacher.dtype=int8"
        raise refused.replace(conflict="trainer.compile=true", why="layers of bitsandbytes are not compiled", hint=hint)
