"""Prompts with responses as rows of tokens: [prompt, response, end], one response each, padded with the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kd.data import templates
from kd.data.corpora import Corpus
from kd.data.counts import Counts, in_words
from kd.data.examples import Example
from kd.data.row_files import announced_bos, in_batches, save_rows, token_dtype
from kd.data.split import TrainValSplit
from kd.data.tokenizer import byte_counts
from kd.errors import UserError


def write_examples(
    folder: Path, corpus: Corpus, documents: Iterable[Example], split: TrainValSplit, fast, seq_len: int, tokens: float,
    val_rows: int, special: bool,
) -> dict:  # fmt: skip
    """Write rows of one response each, and their spans, and return the manifest's entries about them."""
    assert corpus.pairs, "a corpus of examples says how they become rows"
    most, date = corpus.pairs.prompt_len, corpus.pairs.date
    template = templates.template_of(corpus.pairs, documents, fast)
    templates.check_date(date, template, fast)
    if template != "chat":
        announced_bos(fast, seq_len)
    end, size, dtype = templates.end_of_response(template, fast, date), seq_len + 1, token_dtype(fast)
    as_text = templates.special_as_text(fast, special, template)
    spans: dict[str, list] = {"train": [], "val": []}
    val_response_bytes: list[float] = []  # bytes of the responses of validation, as far as rows hold them
    counts, read = Counts("examples"), 0
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        out = {"train": train, "val": val}
        for batch in in_batches(documents, 256):
            for example, rows in zip(batch, templates.encode(batch, template, fast, special, date), strict=True):
                counts.add(example, rows, as_text)
                for prompt, given, text, _ in rows:
                    response = _without_ends(given, end)
                    says = any(token not in (end, fast.eos_token_id) for token in given)
                    if not 0 < len(prompt) <= most or not (says or example.prompt_only):
                        reason = "prompt_too_long" if says or example.prompt_only else "no_response"
                        counts.left_out[reason if prompt else "no_prompt"] += 1
                        continue
                    side, whole = split(example), [*prompt, *response, end]
                    row = whole[:size]
                    if side == "train":
                        read += len(row)
                        if read > tokens:  # what comes later may be shorter, but less is to be a part of more
                            counts.left_out["limit"] += 1
                            continue
                    else:
                        sizes = byte_counts(text, given, fast)[: len(response)]
                        val_response_bytes.append(sizes[: size - len(prompt)].sum())
                    np.array(row + [end] * (size - len(row)), dtype).tofile(out[side])
                    spans[side].append((len(prompt), len(row)))
                    counts.cut += len(whole) > size
    counts.used = {side: len(of) for side, of in spans.items()}
    counts.rows = counts.used | {"val": min(len(spans["val"]), val_rows)}
    if not all(counts.used.values()):
        raise UserError(
            in_words(counts.as_dict()),
            need="at least one example for training and one for validation",
            hint="give more examples, longer rows (data.seq_len=, data.prompt_len=), or a larger share of the examples "
            "to validation (data.val_share=0.2)",
        )
    for side, of in spans.items():
        taken = save_rows(folder, side, dtype, (len(of), size), val_rows)
        table = np.array(of, np.int32)[taken]
        np.save(folder / f"{side}_spans.npy", table)
    learned = (table[:, 1] - table[:, 0]).sum()  # of the validation rows
    return {
        "train_tokens": sum(total for _, total in spans["train"]),
        "bytes_per_token": float(np.array(val_response_bytes)[taken].sum() / learned) or None,
        "template": template, "end": end, "counts": counts.as_dict(),
    }  # fmt: skip


def _without_ends(tokens: list[int], end: int | None) -> list[int]:
    """Return tokens without those ends behind them that are written out."""
    count = len(tokens)
    while count and tokens[count - 1] == end:
        count -= 1
    return tokens[:count]
