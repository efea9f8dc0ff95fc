"""Rules of start=teacher: the student is made of parts of a finished teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.config.groups import TeacherInit
from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig


def check_start_student(config: ExperimentConfig) -> None:
    """Refuse start=teacher beside a student of its own."""
    if config.start.stage == "teacher" and (config.student.size or config.student.name):
        student = f"student={config.student.size}" if config.student.size else f"student.name={config.student.name}"
        why, hint = "the teacher gives the student its shape", "type student=teacher, or start=scratch"
        raise UserError(option="start", got="teacher", conflict=student, why=why, hint=hint)


def check_start(config: ExperimentConfig) -> None:
    """Refuse start=teacher without a finished teacher, or without anything that is left out of it."""
    start, refused = config.start, UserError(option="start", got="teacher")
    if not isinstance(start, TeacherInit):
        return
    if not config.teacher.exists:
        need, hint = "a teacher", "type e.g. teacher=1m; with logits=none it gives the student its first weights alone"
        raise refused.replace(conflict="teacher=none", need=need, hint=hint)
    if config.logits.source.trains_teacher:
        why, hint = "the teacher has not learned anything before the run", "type logits=online"
        raise refused.replace(conflict=f"logits={config.logits.source}", why=why, hint=hint)
    if start.layers is None and not (start.ffn or start.kv_heads or start.hidden):
        why = "nothing of the teacher is left out, so that the student would be the teacher"
        hint = "type start.layers=…, start.ffn=…, start.kv_heads=… or start.hidden=…"
        raise refused.replace(why=why, hint=hint)


def unused_in_start(config: ExperimentConfig, word: str) -> UserError | None:
    """Return the error for a setting of start=teacher without an effect; None if it has one."""
    start, name = config.start, word.lstrip("+").partition("=")[0]
    if not isinstance(start, TeacherInit):
        return None
    if name == "start.keep" and start.keep != "random" and not isinstance(start.layers, int):
        listed = start.layers is not None
        why = f"would do nothing, as {'start.layers lists the layers' if listed else 'all layers stay'}"
        hint = "leave start.keep out, or type start.layers=N, a number"
        return UserError(option=word, why=why, hint=hint)
    if name == "start.sample" and not start.measures:
        why = "would do nothing, as no part is chosen by activations"
        return UserError(option=word, why=why, hint="leave start.sample out")
    return None
