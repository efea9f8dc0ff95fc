"""Assertions on refusals, by the fields of the error instead of its sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kd.errors import UserError, typed


@contextmanager
def refused(**fields: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with these fields, of which its message holds each.

    option, got: the whole value. Other fields: a piece of the text, or a tuple of pieces.
    """
    with pytest.raises(UserError) as caught:
        yield caught
    error = caught.value
    assert error.option or error.hint or error.commands, error
    message = str(error).lower()
    for name, expected in fields.items():
        value = getattr(error, name)
        if name in ("option", "got"):
            assert typed(value) == typed(expected), f"{name} of {error!r}"
        else:
            value = "\n  ".join(value) if name == "commands" else value
            for piece in expected if isinstance(expected, tuple) else (expected,):
                assert str(piece) in value, f"{name} of {error!r}: {value!r} lacks {piece!r}"
        assert value is ... or typed(value).lower() in message, f"{name} of {error!r} is not in its message"
