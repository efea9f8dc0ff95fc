"""Packing of a corpus as rows of tokens on disk.

1. documents  in an order made from their content, so that files of one kind do not stand together (split.py); streams
              as they come
2. split      a document belongs to validation if its hash says so: the same text never lands on both sides
3. tokens     by a tokenizer trained on the spot, or the pretrained model's own
4. rows       documents joined with an end-of-text token and cut into rows of T + 1 tokens (text_rows.py), on disk,
              once, under a lock; prompts with responses (templates.py): each a row of its own, [prompt, response, end],
              padded with the end, and beside the rows where the prompt and all of it end (example_rows.py)
"""

from __future__ import annotations

import inspect
import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from kd.data import templates
from kd.data.batches import Packed, PackedPart
from kd.data.corpora import Corpus
from kd.data.counts import in_words
from kd.data.example_rows import write_examples
from kd.data.mixture import Mixture, errors_of
from kd.data.mixture_rows import write_mixture
from kd.data.split import TrainValSplit, ordered
from kd.data.text_rows import write_text
from kd.data.tokenizer import bos_by_name, load_tokenizer, train_tokenizer, vocabulary_size, word_tokenizer
from kd.errors import UserError, check
from kd.system import files, sealed_folder
from kd.system.console import console
from kd.system.files import read_json
from kd.system.sealed_folder import write_manifest

FORMAT = 1  # of the packed rows; a new one makes new folders
NEUTRAL: dict[str, object] = {"special": "text", "isolate": False, "pack": False}  # newer than many folders' names
SAMPLE = 20_000_000  # characters of the text that a tokenizer is trained on, at most
OPTIONS = (  # of pack() in a config
    "seq_len", "vocab", "tokenizer", "tokens", "val_rows", "val_share", *NEUTRAL,
)  # fmt: skip


def key(
    corpus: Corpus, *, tokenizer_of: tuple[Corpus, dict] | None = None, code: dict[str, str] | None = None, **options
) -> str:
    """Return the name of the packed data: a digest of everything that its content depends on, but for the code.

    options: the other arguments of pack().
    """
    name = options.get("tokenizer")
    content = files.folder_fingerprint(name)
    options = {k: v for k, v in options.items() if k not in NEUTRAL or v != NEUTRAL[k]}
    if name and not (corpus.pairs and corpus.pairs.template == "chat") and (bos := bos_by_name(name)):
        options |= {"bos": bos}
    if tokenizer_of:
        text, text_options = tokenizer_of
        options |= {"tokenizer_of": key(text, **text_options)}
    return files.digest_of([FORMAT, corpus.fingerprint, options, content])[:16]


def folder_name(corpus: Corpus, tokenizer_of: tuple[Corpus, dict] | None = None, **options) -> str:
    """Return the name of the folder that pack() fills with these options. The folder need not exist."""
    given = {name: parameter.default for name, parameter in inspect.signature(pack).parameters.items()} | options
    settings = {name: given[name] for name in ("seq_len", "tokens", "val_rows", "val_share", *NEUTRAL)}
    settings |= {"tokenizer": given["tokenizer"]} if given["tokenizer"] else {"vocab": given["vocab"]}
    return key(corpus, **settings, tokenizer_of=tokenizer_of)


def pack(
    corpus: Corpus, cache: Path, seq_len: int = 256, vocab: int = 1024, tokenizer: str | None = None,
    tokens: int | None = None, val_rows: int = 64, val_share: float = 0.05,
    tokenizer_of: tuple[Corpus, dict] | None = None, special: str = "text", announce: bool = True,
    code: dict[str, str] | None = None, anew: bool = False, isolate: bool = False,
    pack: bool = False,
) -> Packed:  # fmt: skip
    """Return the corpus as rows of seq_len + 1 tokens, which are made once and kept in `cache`.

    vocab: size of the tokenizer to train, unless `tokenizer` names a pretrained one, or it is that of other text,
    `tokenizer_of`, which is packed too. tokens: at most so many for training, padding not counted (a smaller amount is
    a part of a larger one). special: special tokens that are written out in the text are read as text, or as tokens.
    announce: print counts of used and omitted documents.
    isolate: mark the documents in the rows, so that models do not see one from another. pack: put several examples into
    a row for training, and mark them.
    code: digests of the corpus's source, kept in the manifest. anew: pack again if other code packed the data.
    Raises UserError for text too short for one row.
    """
    _check_settings(corpus, seq_len, vocab, tokenizer, tokens, val_rows, val_share, special)
    settings: dict = dict(seq_len=seq_len, tokens=tokens, val_rows=val_rows, val_share=val_share, special=special)
    settings |= {"isolate": isolate, "pack": pack}
    settings |= {"tokenizer": tokenizer} if tokenizer else {"vocab": vocab}

    def make(temporary: Path) -> None:
        trained = {"tokenizer": _tokenizer_folder(cache, *tokenizer_of)} if tokenizer_of else {}
        temporary.mkdir(parents=True)
        _write(temporary, corpus, announce=announce, code=code, **settings | trained)

    folder = Path(cache) / key(corpus, **settings, tokenizer_of=tokenizer_of)
    if anew and code_of(folder) not in (None, code):
        _remove_old(folder, code)
    packed = build_once(folder, make)
    _warn_of_old_bytes(corpus, packed)
    return packed


def _tokenizer_folder(cache: Path, corpus: Corpus, options: dict) -> str:
    """Return the folder of the tokenizer of other text, which is packed first."""
    return str(pack(corpus, cache, **options).tokenizer)


def _check_settings(
    corpus: Corpus, seq_len: int, vocab: int, tokenizer: str | None, tokens: int | None, val_rows: int,
    val_share: float, special: str,
) -> None:  # fmt: skip
    """Raise UserError for a setting of pack() without a meaning."""
    for option, value in dict(seq_len=seq_len, val_rows=val_rows, tokens=tokens).items():
        minimum = seq_len + 1 if option == "tokens" else 1
        if value is not None and value < minimum:
            need = f"at least {minimum}{', one row' if minimum > 1 else ''}"
            raise UserError(option=f"data.{option}", got=value, need=need)
    check("data.val_share", val_share, 0 < val_share < 1, "a share of the documents between 0 and 1, e.g. 0.05")
    if tokenizer is None and not corpus.words:
        check("data.vocab", vocab, vocab >= 257, "at least 257, one token per byte and one for the end of a text")
    check("data.special", special, special in ("text", "tokens"), "text or tokens")
    if special == "tokens" and corpus.words:
        why, hint = "this data has a vocabulary of its own, without special tokens", "leave data.special out"
        raise UserError(option="data.special", got=special, why=why, hint=hint)


def _warn_of_old_bytes(corpus: Corpus, packed: Packed) -> None:
    """Print a line if text was packed before the bytes of the measured rows were counted."""
    if corpus.words or corpus.pairs or (read_json(packed.folder / "manifest.json") or {}).get("measured_bytes"):
        return
    console.print(
        "Bits per byte of this data may be off by some per cent, as they are from before the bytes of the rows "
        f"that are measured were counted. To count them, remove the data, which is then packed anew:\n"
        f"  {shlex.join(['rm', '-r', str(packed.folder)])}",
        soft_wrap=True,
    )  # fmt: skip


def build_once(folder: Path, make: Callable[[Path], None]) -> Packed:
    """Return the packed data of a folder. If it is missing, one process fills it by `make` under a temporary name."""
    sealed_folder.fill_once(folder, make)
    return open_packed(folder)


def code_of(folder: Path) -> dict[str, str] | None:
    """Return the digests of the source that packed data was made by; None of an earlier version, or of no data."""
    return (read_json(folder / "manifest.json") or {}).get("code")


def _remove_old(folder: Path, code: dict[str, str] | None) -> None:
    """Remove packed data that other code made."""
    with filelock.FileLock(sealed_folder.lock_of(folder)):
        if code_of(folder) not in (None, code):
            files.remove(folder)


def open_packed(folder: Path) -> Packed:
    """Return the packed data of a folder; raise UserError if files differ from the ones that were written."""
    manifest = sealed_folder.read_manifest(folder, "the packed data")
    train, val = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "val"))
    packed = Packed(
        folder, train, val, manifest["bytes_per_token"], manifest["entropy"], manifest["digests"],
        counts=manifest.get("counts", {}), parts=tuple(PackedPart(**part) for part in manifest.get("parts", ())),
    )  # fmt: skip
    if "train_marks.npy" in manifest["digests"]:
        packed = replace(packed, train_marks=np.load(folder / "train_marks.npy", mmap_mode="r"))
    if "val_marks.npy" in manifest["digests"]:
        packed = replace(packed, val_marks=np.load(folder / "val_marks.npy", mmap_mode="r"))
    if "end" not in manifest:
        return replace(packed, boundary=tuple(manifest.get("boundary", ())))
    spans = folder / "train_spans.npy"
    train_spans = np.load(spans) if spans.exists() else None
    val_spans = np.load(folder / "val_spans.npy")
    end, template = manifest["end"], manifest["template"]
    return replace(packed, train_spans=train_spans, val_spans=val_spans, eos_token_id=end, template=template)


def _write(
    folder: Path, corpus: Corpus, seq_len: int, tokens: int | None, val_rows: int, val_share: float,
    vocab: int | None = None, tokenizer: str | None = None, special: str = "text", announce: bool = True,
    code: dict[str, str] | None = None, isolate: bool = False, pack: bool = False,
) -> None:  # fmt: skip
    split = TrainValSplit(val_share)
    documents: Any = _ordered_parts(corpus, split) if isinstance(corpus, Mixture) else ordered(corpus, split)
    fast = _tokenizer(corpus, documents, split, vocab, tokenizer)
    fast.save_pretrained(folder / "tokenizer")
    if fast.eos_token_id is None and not corpus.words:
        raise UserError(
            option="data.tokenizer",
            got=tokenizer,
            why="has no token for the end of a text, which separates documents",
            hint="choose a tokenizer that has an eos_token",
        )
    write: Callable[..., dict] = (
        write_mixture if isinstance(corpus, Mixture) else write_examples if corpus.pairs else write_text
    )
    options = (seq_len, tokens or math.inf, val_rows, special == "tokens", isolate or pack)
    about = write(folder, corpus, documents, split, fast, *options)
    has_news = corpus.pairs or about["counts"]["left_out"].keys() - {"limit"} or about["counts"]["special_as_text"]
    if announce and has_news:
        console.print(in_words(about["counts"]), soft_wrap=True)
    about |= {"source": corpus.fingerprint, "vocab": vocabulary_size(fast), "entropy": corpus.entropy}
    about |= {"code": code} if code else {}
    write_manifest(folder, about)


def _ordered_parts(corpus: Mixture, split: TrainValSplit) -> dict[str, Iterable]:
    """Return the ordered documents of each part of a mixture."""
    documents = {}
    for part in corpus.parts:
        with errors_of(part.name):
            documents[part.name] = ordered(part.corpus, split)
    return documents


def _tokenizer(
    corpus: Corpus, documents: Any, split: TrainValSplit, vocab: int | None,
    name: str | None,
):  # fmt: skip
    """Return the tokenizer `name`, one token per word, or byte-level BPE trained on the text.

    Of a mixture, each part gives its share of the text.
    """
    if corpus.words:
        return word_tokenizer(corpus.words)
    if name:
        return load_tokenizer(name, f"The tokenizer of {name}")
    if isinstance(corpus, Mixture):
        samples = (_sample(documents[part.name], split, None, SAMPLE * part.share) for part in corpus.parts)
        return train_tokenizer(chain.from_iterable(samples), vocab)
    template = templates.template_of(corpus.pairs, documents) if corpus.pairs else None
    return train_tokenizer(_sample(documents, split, template), vocab)


def _sample(
    documents: Iterable, split: TrainValSplit, template: str | None, limit: float | None = None
) -> Iterator[str]:
    """Yield texts of the training side, up to `limit` or SAMPLE characters. template: of examples."""
    limit = SAMPLE if limit is None else limit
    read = 0
    for document in documents:
        if read >= limit:
            return
        if split(document) == "train":
            text = document if template is None else templates.written(document, template)
            read += len(text)
            yield text
