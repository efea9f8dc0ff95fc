"""Rules for the step whose weights a run ends with: trainer.keep and trainer.patience."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError
from kd.system.remote import is_url

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig


def check_selection(config: ExperimentConfig) -> None:
    """Refuse a choice of the step beside what goes on to the last step, or holds parts of the weights alone."""
    trainer = config.trainer
    if trainer.keep == "last" and trainer.patience is None:
        return
    chosen, option = trainer.keep != "last", f"trainer.keep={trainer.keep}"
    refused = UserError(option=option if chosen else f"trainer.patience={trainer.patience}")
    if config.record:
        why, hint = "a store is recorded over all steps of a training", f"leave record or {refused.option} out"
        raise refused.replace(conflict=f"record={config.record.name}", why=why, hint=hint)
    if chosen and trainer.strategy == "fsdp":
        why, hint = "each device holds a part of the weights", "type trainer.strategy=ddp, or leave trainer.keep out"
        raise refused.replace(conflict="trainer.strategy=fsdp", why=why, hint=hint)
    if trainer.keep == "best" and config.logits.source.trains_teacher:
        why = "responses would be compared with the teacher of the last step"
        raise refused.replace(conflict=f"logits={config.logits.source}", why=why, hint="leave trainer.keep out")
    if trainer.keep == "all" and not config.adapter.is_none:
        why, hint = "models of each validation would be adapters alone", "type trainer.keep=best, or adapter=none"
        raise refused.replace(conflict=f"adapter={config.adapter.name}", why=why, hint=hint)
    if trainer.keep == "all" and is_url(config.root):
        why, hint = "models of each validation are written to a folder alone", "type root=FOLDER, or trainer.keep=best"
        raise refused.replace(conflict=f"root={config.root}", why=why, hint=hint)
