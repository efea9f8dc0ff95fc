"""Question of a sweep file, and the paper's answer to it, from the comment at its head."""

from __future__ import annotations

from itertools import takewhile

from kd.config.components import option_files


def head(name: str) -> list[str]:
    """Return the comment at the head of a sweep file of kd or of a plug-in, line by line; nothing for other sweeps."""
    path = next((file for file in option_files("sweeps") if file.stem == name), None)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    return [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)]


def question(name: str) -> str:
    return "".join(head(name)[:1]).partition(" (")[0]


def papers_answer(name: str) -> str:
    """Return the paper that asked the same question, and its result."""
    return " ".join(head(name)).partition("Answers to: ")[2]
