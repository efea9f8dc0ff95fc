"""Information about each target token beside the two distributions, from a rollout or a token selection, for a loss.

A loss declares by `@needs` which fields it reads. A rollout or token selection declares by `@provides` which fields it
fills in. Both take literal names: kd/config/token_info.py reads them from the source, without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kd.config.decorators import Function, declare
from kd.errors import UserError

NOT_PROVIDED: Any = None
FLAGS = ("by_student", "is_hard")  # fields that are 0 or 1


@dataclass(frozen=True)
class TokenInfo:
    """One number per position, in tensors of one shape: [B, T] with a batch, [N] with a target. None: not provided.

    Probabilities are those at temperature 1 over the whole vocabulary, at the time of sampling. Fields of sampled text
    are 0 at positions that are no target.
    """

    student_logp: Tensor = NOT_PROVIDED  # log q(y)
    teacher_logp: Tensor = NOT_PROVIDED  # log p(y)
    importance: Tensor = NOT_PROVIDED  # q(y) / p~(y) of this token alone, drawn from p~
    advantage: Tensor = NOT_PROVIDED  # value of the text that follows, see kd.rollout.mixed.returns
    by_student: Tensor = NOT_PROVIDED  # 1 in rows that the student wrote, 0 in those of the data or the teacher
    is_hard: Tensor = NOT_PROVIDED  # 1 where the teacher is uncertain of the target token, else 0
    weight: Tensor = NOT_PROVIDED  # of the token in the loss

    def provided(self) -> dict[str, Tensor]:
        """Return the fields that are not None, by name."""
        return {field.name: x for field in fields(self) if (x := getattr(self, field.name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenInfo:
        """Apply a function to every field that is provided."""
        return TokenInfo(**{name: function(x) for name, x in self.provided().items()})

    def __getitem__(self, index: Any) -> TokenInfo:
        """Select positions, by a slice, an index or a mask."""
        return self.map(lambda x: x[index])

    def __or__(self, other: TokenInfo) -> TokenInfo:
        """Combine the fields of both; `other` takes precedence."""
        return TokenInfo(**self.provided() | other.provided())

    def to(self, device: torch.device | str) -> TokenInfo:
        """Copy to a device; Lightning calls this too."""
        return self.map(lambda x: x.to(device))

    def split(self, size: int | Sequence[int]) -> list[TokenInfo]:
        """Split along the first dimension, as Tensor.split does. At least one field has to be provided."""
        parts = zip(*(x.split(size) for x in self.provided().values()), strict=True)
        return [TokenInfo(**dict(zip(self.provided(), part, strict=True))) for part in parts]

    @classmethod
    def concatenate(cls, parts: Sequence[TokenInfo]) -> TokenInfo:
        """Concatenate along the first dimension; every part has to provide the fields of the first."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].provided()})

    @classmethod
    def example(cls, names: Sequence[str]) -> TokenInfo:
        """Return plausible values of some fields for two positions, with which to try a loss."""
        return cls(**{name: torch.tensor([0.0, 1.0]) if name in FLAGS else torch.ones(2) for name in names})


FIELDS = tuple(field.name for field in fields(TokenInfo))


def needs(*names: str) -> Callable[[Function], Function]:
    """Declare the fields of TokenInfo that a loss reads."""
    return declare("needs", names, FIELDS)


def provides(*names: str) -> Callable[[Function], Function]:
    """Declare the fields of TokenInfo that a rollout or token selection fills in for every batch."""
    return declare("provides", names, FIELDS)


def needs_of(loss: Callable) -> tuple[str, ...]:
    """Return the fields of TokenInfo that a loss declares, whether or not some of its arguments are bound."""
    return getattr(getattr(loss, "func", loss), "needs", ())


def check_needs(loss: Callable, info: TokenInfo) -> None:
    """Raise UserError unless every field that a loss needs is provided."""
    if missing := [name for name in needs_of(loss) if getattr(info, name) is None]:
        raise UserError(
            option="loss",
            why=f"needs {', '.join(missing)} of each token, which neither the rollout nor the token selection provides",
            hint="choose another loss, or a rollout or token selection that provides it",
        )
