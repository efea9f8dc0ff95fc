"""Preview of packed data: a few rows as a model reads them, and counts of used and omitted documents."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
from rich.text import Text

from kd.data import templates
from kd.data.batches import IGNORE, Packed, to_batch
from kd.data.chat_template import ChatTemplate
from kd.data.counts import in_words
from kd.data.examples import Turn
from kd.system.console import Terminal, counted, strip_control_characters

COLOURS = {"prompt": "cyan", "learned": "green"}


class Shown(NamedTuple):
    """A row of training, without padding. Labels are those of training, under their own tokens, without a shift."""

    row: int
    text: str
    prompt: str
    learned: str
    ids: list[int]
    labels: list[int]


def shown(packed: Packed, tokenizer, count: int) -> list[Shown]:
    """Return the first rows of training."""
    rows = np.arange(min(count, len(packed.train)))
    ids = packed.train[rows]
    spans = np.array([(0, ids.shape[1])] * len(rows)) if packed.train_spans is None else packed.train_spans[rows]
    if packed.prompts_only:  # the end alone is no response
        spans = np.where(spans[:, 1:] == spans[:, :1] + 1, spans[:, :1], spans)
    marks = None if packed.train_marks is None else packed.train_marks[rows]
    batch = to_batch(ids, rows, np.zeros(ids[:, 1:].shape, np.int64), spans, packed.boundary, marks)
    examples = []
    for row, (prompt_len, total) in enumerate(spans.tolist()):
        labels = [IGNORE, *batch.labels[row].tolist()][:total]
        learned = [label for label in labels if label != IGNORE]
        parts = (ids[row, :total], ids[row, :prompt_len], learned)
        text, prompt, answer = (tokenizer.decode(np.array(part, int)) for part in parts)
        examples.append(Shown(row, text, prompt, answer, ids[row, :total].tolist(), labels))
    return examples


def layout(packed: Packed, tokenizer, date: str | None = None) -> dict[str, str]:
    """Return the parts of a template in order, with a prompt {user} and a response {assistant}; {} for plain text."""
    if packed.template is None:
        return {}
    if packed.template != "chat":
        prompt, inserted = templates.WRITTEN[packed.template]([Turn("user", "{user}")]), ""
    else:
        prompt, inserted, _ = ChatTemplate(tokenizer, date=date).layout()
    return {
        "prompt": prompt,
        "inserted": inserted,
        "learned": "{assistant}",
        "end": tokenizer.decode([packed.eos_token_id]),
    }


def as_json(packed: Packed, tokenizer, count: int, date: str | None = None) -> str:
    """Return rows, counts and the template as JSON."""
    about: dict = {"folder": str(packed.folder), "template": packed.template, "layout": layout(packed, tokenizer, date)}
    about |= {"counts": packed.counts, "train_rows": len(packed.train), "val_rows": len(packed.val)}
    rows = [row._asdict() for row in shown(packed, tokenizer, count)]
    return json.dumps(about | {"rows": rows}, ensure_ascii=False, indent=1)


def show(packed: Packed, tokenizer, count: int, date: str | None = None) -> None:
    """Print rows, counts and the template, for people."""
    terminal = Terminal(highlight=False)
    special = np.array(sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special))

    def part(ids: list[int], labels: list[int], kind: str) -> None:
        ids, learned = np.array(ids), np.array(labels) != IGNORE
        count = learned.sum() if kind == "learned" else len(ids)
        terminal.print(Text(f"{kind}, {counted(count, 'token', 'tokens')}", "dim"))
        text, is_special = Text(), np.isin(ids, special)
        borders = np.flatnonzero(np.diff(is_special) | np.diff(learned)) + 1
        for piece, flags, counts in zip(*(np.split(x, borders) for x in (ids, is_special, learned)), strict=True):
            style = COLOURS["learned" if counts[0] else "prompt"]
            text.append(strip_control_characters(tokenizer.decode(piece)), f"reverse {style}" if flags[0] else style)
        terminal.print(text, soft_wrap=True)

    for row in shown(packed, tokenizer, count):
        prompt = 0 if packed.train_spans is None else int(packed.train_spans[row.row, 0])
        terminal.print(Text(f"row {row.row} of {len(packed.train):,}", "bold"))
        if prompt:
            part(row.ids[:prompt], row.labels[:prompt], "prompt")
        if row.ids[prompt:]:
            part(row.ids[prompt:], row.labels[prompt:], "learned")
        terminal.print()
    if parts := layout(packed, tokenizer, date):
        terminal.print(Text(f"template {packed.template}", "bold"))
        for name, text in parts.items():
            if text:
                line = Text(f"{name:<9}{strip_control_characters(text)!r}", COLOURS.get(name, ""))
                terminal.print(line, soft_wrap=True)
        terminal.print()
    unknown = "Not known of this folder, which an earlier version packed."
    terminal.print(Text(in_words(packed.counts) or unknown), soft_wrap=True)
    terminal.print(Text(str(packed.folder), "dim"), soft_wrap=True)
