"""Decorators of components that declare names. kd/config/declarations.py reads them from the source."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def declare(decorator: str, names: tuple[str, ...], allowed: Collection[str]) -> Callable[[Function], Function]:
    """Return a decorator that keeps the names as an attribute of the function, under its name `decorator`.

    Raises TypeError for a name that is not allowed.
    """
    if unknown := sorted(set(names) - set(allowed)):
        raise TypeError(f"@{decorator} takes {', '.join(allowed)}, and not {', '.join(unknown)}")

    def mark(function: Function) -> Function:
        setattr(function, decorator, names)
        return function

    return mark
