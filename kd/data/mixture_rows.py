"""Rows of a mixture: those of each part, in the proportion of the weights, spread evenly.

Weights hold exactly, up to a row: the part that is used up first ends the mixture, and further rows of the other parts
are left out. No row is repeated within an epoch.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kd.data.mixture import Mixture, Part, errors_of
from kd.data.split import TrainValSplit
from kd.data.text_rows import write_text
from kd.errors import UserError
from kd.system.console import console


def write_mixture(
    folder: Path, corpus: Mixture, documents: Mapping[str, Iterable[str]], split: TrainValSplit, fast, seq_len: int,
    tokens: float, val_rows: int, special: bool, isolate: bool = False,
) -> dict:  # fmt: skip
    """Write the rows of all parts, and return the manifest's entries about them. documents: of each part."""
    written = []
    for part in corpus.parts:
        place = folder / f"part-{part.name}"
        place.mkdir()
        limit = tokens * part.share
        if limit < seq_len + 1:
            why = f"gives part {part.name} {limit:,.0f} tokens for training"
            raise UserError(option="data.tokens", got=tokens, why=why, need=f"at least {seq_len + 1:,}, one row")
        with errors_of(part.name):
            about = write_text(
                place, part.corpus, documents[part.name], split, fast, seq_len, limit, val_rows, special, isolate
            )  # fmt: skip
        written.append(about)
    available = [about["counts"]["rows"]["train"] for about in written]
    used = rows_by_weight(available, corpus.parts)
    row = seq_len + 1
    is_limited = tokens < math.inf and all(
        count >= int(tokens * part.share) // row for count, part in zip(available, corpus.parts, strict=True)
    )
    console.print(in_words(corpus.parts, available, used, is_limited), soft_wrap=True)
    _join(folder, corpus.parts, used)
    parts = [
        {"name": part.name, "weight": part.share, "train_rows": count, "val_rows": about["counts"]["rows"]["val"],
         "bytes_per_token": about["bytes_per_token"]}
        for part, count, about in zip(corpus.parts, used, written, strict=True)
    ]  # fmt: skip
    per_token = [part["weight"] * (part["bytes_per_token"] or math.nan) for part in parts]
    about = {
        "counts": _counts([about["counts"] for about in written], sum(used)), "parts": parts,
        "train_tokens": sum(used) * (seq_len + 1),
        "bytes_per_token": None if math.isnan(sum(per_token)) else sum(per_token), "measured_bytes": True,
    }  # fmt: skip
    return about | ({"boundary": written[0]["boundary"]} if "boundary" in written[0] else {})


def rows_by_weight(available: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Return how many training rows of each part are used: as many as the weights allow, without a repeat."""
    total = min(count / part.share for count, part in zip(available, parts, strict=True))
    used = [min(count, int(part.share * total + 1e-6)) for count, part in zip(available, parts, strict=True)]
    for part, count in zip(parts, used, strict=True):
        if not count:
            raise UserError(
                option=f"data.parts.{part.name}.weight",
                why=f"is a share of {part.share:.2g}, less than one row of the {total:,.0f} rows that the parts give",
                hint=f"give {part.name} a larger weight, or give more text of the part that is used up first",
            )
    return used


def interleaved(counts: Sequence[int]) -> np.ndarray:
    """Return the number of the part [R] of each row, so that any stretch of rows has nearly the same proportions."""
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


def in_words(parts: Sequence[Part], available: Sequence[int], used: Sequence[int], is_limited: bool) -> str:
    """Return a line about the rows of each part, and what ends the mixture. is_limited: data.tokens does."""
    shares = ", ".join(
        f"{part.name} {count / sum(used):.1%} ({count:,} of {n:,} rows)"
        for part, count, n in zip(parts, used, available, strict=True)
    )
    line = f"Mixture of {sum(used):,} rows for training: {shares}."
    left = sum(available) - sum(used)
    if is_limited or not left:
        return line
    first = min(range(len(parts)), key=lambda i: available[i] / parts[i].share)
    return (
        f"{line} {parts[first].name} is used up first and ends the mixture: {left:,} rows of other parts are left out. "
        "Nothing is repeated before all rows were read."
    )


def _join(folder: Path, parts: Sequence[Part], used: Sequence[int]) -> None:
    """Write train.npy and val.npy from the files of the parts, and remove these."""
    places = [folder / f"part-{part.name}" for part in parts]
    order = interleaved(used)
    for name in sorted(file.name for file in places[0].glob("train*.npy")):
        tables = [np.load(place / name, mmap_mode="r") for place in places]
        shape = (len(order), *tables[0].shape[1:])
        joined = np.lib.format.open_memmap(folder / name, "w+", tables[0].dtype, shape)
        for number, (table, count) in enumerate(zip(tables, used, strict=True)):
            joined[order == number] = table[:count]
        joined.flush()
        validation = name.replace("train", "val")
        np.save(folder / validation, np.concatenate([np.load(place / validation) for place in places]))
    del joined, tables
    for place in places:
        shutil.rmtree(place)


def _counts(parts: Sequence[dict], train_rows: int) -> dict:
    """Return the counts of all parts together."""
    whole = dict(parts[0])
    for name, value in whole.items():
        if isinstance(value, int):
            whole[name] = sum(part[name] for part in parts)
        elif isinstance(value, dict):
            whole[name] = dict(sum((Counter(part[name]) for part in parts), Counter()))
    whole["rows"] |= {"train": train_rows}
    return whole
