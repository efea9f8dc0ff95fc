"""Numbers and lists as text."""

from __future__ import annotations


def join_words(words: list[str]) -> str:
    """Join words: a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def format_amount(value: float) -> str:
    """Return a number as text: 85k, 1.2M, 3B, 4.5e+12."""
    for bound, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "B")):
        if value < 0.9995 * bound:
            return f"{value / bound * 1e3:.3g}{unit}"
    return f"{value:.2g}"


def format_number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """Return a number with a true minus sign, or a dash if there is no value."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def plus_minus(half: float | None, digits: int = 4) -> str:
    """Return " ± 0.1234", or nothing if there is no interval."""
    return "" if half is None else f" ± {format_number(half, digits)}"
