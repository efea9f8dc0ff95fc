"""Text of `python train.py --help`: first commands, config groups, and their options with a meaning each."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kd.config.components import GROUPS, meaning, option_files
from kd.config.sizes import SIZES
from kd.system import programs

EXAMPLES = (  # program, words, meaning
    ("train", "", "one run with the defaults"),
    ("train", "loss=akl truncation=top_k truncation.k=50 temperature.tau=2", "another one"),
    ("train", "-m loss=fkl,rkl,akl seed=0,1,2", "a sweep by hand, each run in its own process"),
    ("train", "sweeps=loss", "a predefined sweep; again: only what is missing"),
    ("report", "loss", "its table and plots"),
)


def examples() -> str:
    """Return the first commands to try, a line each."""
    typed = [f"{programs.command(program)} {words}".rstrip() for program, words, _ in EXAMPLES]
    width = max(map(len, typed)) + 2
    return "\n".join(f"  {line:<{width}}{meaning}" for line, (*_, meaning) in zip(typed, EXAMPLES, strict=True))


def axes() -> str:
    """Return the options of every group, a line each."""
    lines = []
    for group, words in GROUPS.items():
        lines.append(f"  {group}: {words}")
        lines += [f"    {f'{group}={name}':<24} {words}".rstrip() for name, words in _options(group)]
    return "\n".join(lines)


def _options(group: str) -> Iterator[tuple[str, str]]:
    """Yield name and meaning of each option: the first comment of its file, else the docstring of its function."""
    if group in ("student", "teacher"):
        for name, size in SIZES.items():
            yield name, f"{size.layers} layers of width {size.hidden}, {size.parameters:,} parameters + embeddings"
    for file in option_files(group):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("# @package")]
        first = lines.pop(0) if lines else ""
        if not first.startswith("_target_:"):
            yield file.stem, first[1:].strip() if first.startswith("#") else ""
        else:
            if group == "record":
                lines = [*(line for line in lines if not line.startswith("biased")), "path: null"]
            settings = " ".join(line.replace(": ", "=") for line in lines)
            explained = meaning(first.split()[-1], group)
            words = re.split(r"[.,;] (?=[A-Z(])|, nats|\. Raises", explained)[0].rstrip(".")
            yield file.stem, f"{words}{f' [{settings}]' if settings else ''}"
