"""Question of a sweep file, and the paper's answer to it, from the comment at its head."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

SWEEPS = Path(__file__).parent.parent


def head(name: str) -> list[str]:
    """Return the comment at the head of a sweep file of this project, line by line; nothing for any other sweep."""
    path = SWEEPS / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)]


def question(name: str) -> str:
    return "".join(head(name)[:1]).partition(" (")[0]


def papers_answer(name: str) -> str:
    """Return which paper asked the same, and what it found."""
    return " ".join(head(name)).partition("Answers to: ")[2]
