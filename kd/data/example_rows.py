"""Prompts with responses as rows of tokens: [prompt, response, end], one response each, padded with the end.

For training, a row can hold several of them one after another, with marks (kd.data.batches.FIRST) instead of spans.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from statistics import median_low

import numpy as np

from kd.data import templates
from kd.data.batches import FIRST, NOT_LEARNED
from kd.data.corpora import Corpus
from kd.data.counts import Counts, in_words
from kd.data.examples import Example
from kd.data.row_files import announced_bos, in_batches, save_rows, save_table, token_dtype
from kd.data.split import TrainValSplit
from kd.data.tokenizer import byte_counts
from kd.errors import UserError

OPEN_ROWS = 32  # rows that a further example may be put into


def write_examples(
    folder: Path, corpus: Corpus, documents: Iterable[Example], split: TrainValSplit, fast, seq_len: int, tokens: float,
    val_rows: int, special: bool, pack: bool = False,
) -> dict:  # fmt: skip
    """Write rows of one response each, and their spans, and return the manifest's entries about them.

    pack: put several examples into a row for training, and write marks in place of its spans.
    """
    assert corpus.pairs, "a corpus of examples says how they become rows"
    date = corpus.pairs.date
    template = templates.template_of(corpus.pairs, documents, fast)
    templates.check_date(date, template, fast)
    if template != "chat":
        announced_bos(fast, seq_len)
    end = templates.end_of_response(template, fast, date)
    as_text = templates.special_as_text(fast, special, template)
    rows = _ExampleRows(folder, split, fast, end, seq_len + 1, corpus.pairs.prompt_len, tokens, pack)
    with closing(rows):
        for batch in in_batches(documents, 256):
            encoded = templates.encode(batch, template, fast, special, date)
            for example, encoded_rows in zip(batch, encoded, strict=True):
                rows.counts.add(example, encoded_rows, as_text)
                for row in encoded_rows:
                    rows.add(example, row)
        rows.write_open_rows()
    return rows.manifest(val_rows, template)


class _ExampleRows:
    """Rows of examples under way: SIDE.bin, and where prompt and response of each row end.

    end: token that ends a response. size: tokens of a row. prompt_len: tokens of a prompt, at most. limit: tokens for
    training, at most. pack: see write_examples().
    """

    def __init__(
        self, folder: Path, split: TrainValSplit, fast, end: int | None, size: int, prompt_len: int, limit: float,
        pack: bool,
    ):  # fmt: skip
        self.folder, self.split, self.fast, self.end = folder, split, fast, end
        self.size, self.prompt_len, self.limit = size, prompt_len, limit
        self.dtype, self.counts, self.tokens = token_dtype(fast), Counts("examples"), 0
        self.spans: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
        self.val_response_bytes: list[float] = []  # as far as rows hold them
        self.too_long: list[int] = []  # tokens of the prompts that are left out for their length
        self.files = {side: open(folder / f"{side}.bin", "wb") for side in ("train", "val")}
        if pack:
            self.files["train_marks"] = open(folder / "train_marks.bin", "wb")
        self.packs = pack
        self.open_rows: list[tuple[list[int | None], list[int]]] = []  # tokens and marks of rows that have room
        self.full_rows = 0

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def add(self, example: Example, encoded_row: templates.Row) -> None:
        """Write a row of an example, if its prompt is short enough and there is something to learn."""
        prompt, given = encoded_row.prompt, encoded_row.response
        response = _without_ends(given, self.end)
        is_learned = example.prompt_only or any(token not in (self.end, self.fast.eos_token_id) for token in given)
        if not 0 < len(prompt) <= self.prompt_len or not is_learned:
            reason = "prompt_too_long" if is_learned else "no_response"
            self.counts.left_out[reason if prompt else "no_prompt"] += 1
            if prompt and is_learned:
                self.too_long.append(len(prompt))
            return
        side, whole = self.split(example), [*prompt, *response, self.end]
        row = whole[: self.size]
        if side == "train":
            self.tokens += len(row)
            if self.tokens > self.limit:  # what comes later may be shorter, but less is to be a part of more
                self.counts.left_out["limit"] += 1
                return
        else:
            sizes = byte_counts(encoded_row.text, given, self.fast)[: len(response)]
            self.val_response_bytes.append(sizes[: self.size - len(prompt)].sum())
        if self.packs and side == "train":
            self._add_to_row(row, [FIRST] + [NOT_LEARNED] * (len(prompt) - 1) + [0] * (len(row) - len(prompt)))
        else:
            np.array(row + [self.end] * (self.size - len(row)), self.dtype).tofile(self.files[side])
        self.spans[side].append((len(prompt), len(row)))
        self.counts.cut += len(whole) > self.size

    def _add_to_row(self, tokens: list[int | None], marks: list[int]) -> None:
        """Add an example to the first row with room among the last OPEN_ROWS, or to a new one."""
        for row, row_marks in self.open_rows:
            if len(row) + len(tokens) <= self.size:
                row += tokens
                row_marks += marks
                return
        if len(self.open_rows) == OPEN_ROWS:
            self._write_row()
        self.open_rows.append((tokens, marks))

    def _write_row(self) -> None:
        """Write the first open row, padded with the end."""
        tokens, marks = self.open_rows.pop(0)
        padding = self.size - len(tokens)
        np.array(tokens + [self.end] * padding, self.dtype).tofile(self.files["train"])
        np.array(marks + [NOT_LEARNED] * padding, np.uint8).tofile(self.files["train_marks"])
        self.full_rows += 1

    def write_open_rows(self) -> None:
        """Write the rows that had room to the end."""
        while self.open_rows:
            self._write_row()

    def manifest(self, val_rows: int, template: str) -> dict:
        """Make tables of the files, and return the manifest's entries; raises UserError if a side is empty."""
        counts = self.counts
        counts.used = {side: len(spans) for side, spans in self.spans.items()}
        counts.rows = counts.used | {"val": min(len(self.spans["val"]), val_rows)}
        if not all(counts.used.values()):
            raise self._side_is_empty(template)
        if self.packs:
            counts.rows["train"] = self.full_rows
            shape = (self.full_rows, self.size)
            save_rows(self.folder, "train", self.dtype, shape, val_rows)
            save_table(self.folder, "train_marks", np.uint8, shape, slice(None))
        for side, spans in self.spans.items():
            if self.packs and side == "train":
                continue
            chosen = save_rows(self.folder, side, self.dtype, (len(spans), self.size), val_rows)
            table = np.array(spans, np.int32)[chosen]
            np.save(self.folder / f"{side}_spans.npy", table)
        learned = (table[:, 1] - table[:, 0]).sum()  # of the validation rows
        return {
            "train_tokens": sum(total for _, total in self.spans["train"]),
            "bytes_per_token": float(np.array(self.val_response_bytes)[chosen].sum() / learned) or None,
            "template": template, "end": self.end, "counts": counts.as_dict(),
        }  # fmt: skip

    def _side_is_empty(self, template: str) -> UserError:
        """Return the error for data without a row for training or validation."""
        why, need = in_words(self.counts.as_dict()), "at least one example for training and one for validation"
        if self.spans["train"]:
            hint = "give more examples, or a larger share of them to validation (data.val_share=0.2)"
            return UserError(option="data", why=why, need=need, hint=hint)
        if self.spans["val"] or not self.too_long:
            return UserError(option="data", why=why, need=need, hint="give more examples")
        shortest, longest, median = min(self.too_long), max(self.too_long), median_low(self.too_long)
        text = "" if template == "plain" else f", with what data.template={template} adds to them"
        rows = "" if median < self.size - 1 else f" data.seq_len={2 * median}"  # as much again for the response
        return UserError(
            option="data.prompt_len",
            got=self.prompt_len,
            why=f"{why}; the prompts that are left out for their length have "
            f"{f'{longest:,}' if shortest == longest else f'{shortest:,} to {longest:,}'} tokens{text}",
            need=need,
            hint=f"type data.prompt_len={median}{rows}, which keeps half of them or more; or give shorter prompts",
        )


def _without_ends(tokens: list[int], end: int | None) -> list[int]:
    """Return tokens without those ends behind them that are written out."""
    count = len(tokens)
    while count and tokens[count - 1] == end:
        count -= 1
    return tokens[:count]
