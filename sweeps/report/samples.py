"""Responses side by side: prompt, reference, teacher, and each student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from kd.identity import model_name
from kd.progress import harmless
from kd.run import RESPONSES
from sweeps.compare import Group, subset
from sweeps.table import GREY, Row

SHOWN = 5  # prompts
MOST = 4000  # characters that are shown of a text


class Said(NamedTuple):
    """Who wrote what."""

    who: str
    text: str
    color: str
    rouge_l: float | None = None


class Sample(NamedTuple):
    """A prompt, the reference, and what everyone wrote."""

    number: int  # of the validation row, from 1
    said: list[Said]


Asked = list[tuple[Row, dict[int, dict]]]  # rows of the table, and what their runs wrote, by validation row


def samples(table: list[Row]) -> list[Sample]:
    """Some prompts, spread evenly over the validation rows, so without a look at what came of them.

    Of each row of the table the run with the lowest seed, and its first sample. One that was asked something else than
    the first, or in another way, or whose file is damaged, is left out.
    """
    asked: Asked = [(row, found) for row in table if (found := responses(row.group))]
    if not asked:
        return []
    first, prompts = asked[0]
    asked = [(row, lines) for row, lines in asked if how(row) == how(first)]
    numbers, count = sorted(prompts), min(SHOWN, len(prompts))
    return [sample(asked, numbers[len(numbers) * i // count]) for i in range(count)]


def how(row: Row) -> str:
    return subset(row.group.config, "responses")


def sample(asked: Asked, number: int) -> Sample:
    """One prompt; each teacher once, by its name."""
    first = asked[0][1][number]
    lines = [(row, of[number]) for row, of in asked if of.get(number, {}).get("prompt") == first["prompt"]]
    teachers = {f"teacher {model_name(row.group.config, 'teacher')}": line for row, line in reversed(lines)
                if isinstance(line.get("teacher"), str)}  # fmt: skip
    said = [Said(name, cut(first[name]), GREY) for name in ("prompt", "reference")]
    said += [Said(who, cut(x["teacher"]), GREY, score(x.get("teacher_rouge_l"))) for who, x in sorted(teachers.items())]
    said += [Said(row.group.label, cut(x["response"]), row.color, score(x.get("rouge_l"))) for row, x in lines]
    return Sample(number + 1, said)


def responses(group: Group) -> dict[int, dict]:
    """The first sample of a group's first run, by validation row; nothing of a file that is not what a run writes."""
    folder: Path = group.runs[min(group.runs)].folder
    try:
        with open(folder / RESPONSES, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        found = {line["row"]: line for line in lines if line["sample"] == 0}
        texts = [line[name] for line in found.values() for name in ("prompt", "reference", "response")]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if all(type(row) is int for row in found) and all(isinstance(x, str) for x in texts) else {}


def score(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def cut(text: str) -> str:
    text = harmless(text)
    return text if len(text) <= MOST else f"{text[:MOST]} …"
