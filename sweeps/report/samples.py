"""Responses side by side: prompt, reference, teacher, and each student."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kd.runs.identity import model_name
from kd.runs.seal import RESPONSES
from kd.system.console import strip_control_characters
from sweeps.report.groups import Group, subset
from sweeps.report.table import GREY, Row

MOST_SAMPLES = 5
MOST_CHARACTERS = 4000  # of a text


@dataclass(frozen=True)
class SampleText:
    """Text of a sample with its author."""

    author: str
    text: str
    color: str
    rouge_l: float | None = None


@dataclass(frozen=True)
class Sample:
    """Prompt, reference and all responses to it."""

    number: int  # of the validation row, from 1
    texts: list[SampleText]


Responses = list[tuple[Row, dict[int, dict]]]  # rows of the table with what their runs wrote, by validation row


def samples_of(table: list[Row]) -> list[Sample]:
    """Return some prompts, spread evenly over the validation rows and so chosen independently of their responses.

    Each row of the table shows the run with the lowest seed, and its first sample. A row is left out if its prompts or
    its settings of responses differ from the first row's, or if its file is damaged.
    """
    responses: Responses = [(row, lines) for row in table if (lines := first_samples(row.group))]
    if not responses:
        return []
    first, prompts = responses[0]
    responses = [(row, lines) for row, lines in responses if settings_of(row) == settings_of(first)]
    numbers, count = sorted(prompts), min(MOST_SAMPLES, len(prompts))
    return [sample(responses, numbers[len(numbers) * i // count]) for i in range(count)]


def settings_of(row: Row) -> str:
    return subset(row.group.config, "responses")


def sample(responses: Responses, number: int) -> Sample:
    """Return one prompt; each teacher once, by its name."""
    first = responses[0][1][number]
    prompt = first["prompt"]
    lines = [(row, by_row[number]) for row, by_row in responses if by_row.get(number, {}).get("prompt") == prompt]
    teachers = {f"teacher {model_name(row.group.config, 'teacher')}": line for row, line in reversed(lines)
                if isinstance(line.get("teacher"), str)}  # fmt: skip
    texts = [SampleText(name, cut(first[name]), GREY) for name in ("prompt", "reference")]
    texts += [SampleText(name, cut(line["teacher"]), GREY, score(line.get("teacher_rouge_l")))
              for name, line in sorted(teachers.items())]  # fmt: skip
    texts += [SampleText(row.group.label, cut(line["response"]), row.color, score(line.get("rouge_l")))
              for row, line in lines]  # fmt: skip
    return Sample(number + 1, texts)


def first_samples(group: Group) -> dict[int, dict]:
    """Return the first sample of a group's first run, by validation row; nothing if the file is damaged."""
    folder = group.runs[min(group.runs)].folder
    try:
        with open(folder / RESPONSES, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        by_row = {line["row"]: line for line in lines if line["sample"] == 0}
        texts = [line[name] for line in by_row.values() for name in ("prompt", "reference", "response")]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return by_row if all(type(row) is int for row in by_row) and all(isinstance(x, str) for x in texts) else {}


def score(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def cut(text: str) -> str:
    text = strip_control_characters(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
