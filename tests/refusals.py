"""What is to be refused, by the fields of the error instead of its sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kd.errors import UserError, typed


@contextmanager
def refused(*, plain: bool = False, **fields: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with these fields: option and got as they are, of the others a piece, or a tuple of pieces.

    Its message has to hold what the fields do. plain: allow one without an option, a hint and commands.
    """
    with pytest.raises(UserError) as caught:
        yield caught
    check_fields(caught.value, **fields)
    assert plain or caught.value.option or caught.value.hint or caught.value.commands, caught.value


def check_fields(error: UserError, **fields: object) -> None:
    """Compare the fields of an error with those given, as `refused` does."""
    for name, expected in fields.items():
        value = getattr(error, name)
        if name == "option":
            assert value == (None if expected is None else str(expected)), error
        elif name == "got":
            assert typed(value) == typed(expected), error
        else:
            value = "\n".join(value) if name == "commands" else value
            for piece in expected if isinstance(expected, tuple) else (expected,):
                assert str(piece) in value, f"{name} of {error!r}: {value!r} lacks {piece!r}"
        text = typed(value) if name == "got" else str(value or "")
        assert text.lower() in str(error).replace("\n  ", "\n").lower(), f"{name} of {error!r} is not in its message"
