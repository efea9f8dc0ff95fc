"""Rules for rows of several documents that do not see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig


def check_isolation(config: ExperimentConfig) -> None:
    """Refuse FlashAttention 2, which keeps documents apart in batches of a single row alone."""
    setting = config.data.isolation
    if setting and config.trainer.attention == "flash_attention_2":
        raise UserError(
            option=setting,
            got=True,
            conflict="trainer.attention=flash_attention_2",
            why="it keeps the documents of a row apart in batches of one row alone",
            hint=f"type trainer.attention=sdpa, or leave {setting} out",
        )
