"""From a corpus to rows of tokens on disk.

1. documents  in an order made from their content, so that files of one kind do not stand together; streams as they come
2. split      a document belongs to validation if its hash says so: the same text never lands on both sides
3. tokens     by a tokenizer trained on the spot, or the pretrained model's own
4. rows       documents joined with an end-of-text token and cut into rows of T + 1 tokens, on disk, once, under a lock;
              prompts with responses (kd/data/templates.py): each a row of its own, [prompt, response, end], padded with
              the end, and beside the rows where the prompt and all of it end
"""

from __future__ import annotations

import inspect
import math
import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import xxhash

from kd.data import templates
from kd.data.batches import Packed, between
from kd.data.corpora import Corpus
from kd.data.counts import in_words
from kd.data.examples import Example
from kd.data.tokenizer import bos_by_name, bos_of, byte_counts, load_tokenizer, vocabulary_size
from kd.errors import UserError, check
from kd.system import files
from kd.system.console import console, track
from kd.system.files import read_json

FORMAT = 1  # of the packed rows; a new one makes new folders
END = "<|endoftext|>"
OPTIONS = ("seq_len", "vocab", "tokenizer", "tokens", "val_rows", "val_share", "special")  # of pack() in a config


def key(corpus: Corpus, **settings) -> str:
    """Name of the packed data: a digest of everything that its content depends on, but for the code."""
    settings.pop("code", None)
    content, name = files.stamp(settings.get("tokenizer")), settings.get("tokenizer")
    if settings.get("special") == "text":  # an option that is newer than many folders
        del settings["special"]
    if name and not (corpus.pairs and corpus.pairs.template == "chat") and (bos := bos_by_name(name)):
        settings["bos"] = bos
    if of := settings.pop("tokenizer_of", None):
        settings["tokenizer_of"] = key(of[0], **of[1])
    return files.digest_of([FORMAT, corpus.fingerprint, settings, content])[:16]


def folder_name(corpus: Corpus, tokenizer_of: tuple[Corpus, dict] | None = None, **options) -> str:
    """Name of the folder that pack() fills with these options, whether or not it has done so."""
    given = {name: parameter.default for name, parameter in inspect.signature(pack).parameters.items()} | options
    settings = {name: given[name] for name in ("seq_len", "tokens", "val_rows", "val_share", "special")}
    settings |= {"tokenizer": given["tokenizer"]} if given["tokenizer"] else {"vocab": given["vocab"]}
    return key(corpus, **settings, tokenizer_of=tokenizer_of)


def pack(
    corpus: Corpus, cache: Path, seq_len: int = 256, vocab: int = 1024, tokenizer: str | None = None,
    tokens: int | None = None, val_rows: int = 64, val_share: float = 0.05,
    tokenizer_of: tuple[Corpus, dict] | None = None, special: str = "text", announce: bool = True,
    code: dict[str, str] | None = None, anew: bool = False,
) -> Packed:  # fmt: skip
    """The corpus as rows of seq_len + 1 tokens, made once and kept in `cache`.

    vocab: size of the tokenizer to train, unless `tokenizer` names a pretrained one, or it is that of other text,
    `tokenizer_of`, which is packed too. tokens: at most so many for training, padding not counted (a smaller amount is
    a part of a larger one). special: special tokens that are written out in the text are read as text, or as tokens.
    announce: print what became of all that was read.
    code: digests of the source of the corpus, kept in the manifest. anew: what other code packed is packed anew.
    Raises UserError for text too short for one row.
    """
    settings: dict = dict(seq_len=seq_len, tokens=tokens, val_rows=val_rows, val_share=val_share)
    for option, value in dict(seq_len=seq_len, val_rows=val_rows, tokens=tokens).items():
        least = seq_len + 1 if option == "tokens" else 1
        if value is not None and value < least:
            need = f"at least {least}{', one row' if least > 1 else ''}"
            raise UserError(option=f"data.{option}", got=value, need=need)
    check("data.val_share", val_share, 0 < val_share < 1, "a share of the documents between 0 and 1, e.g. 0.05")
    if tokenizer is None and not corpus.words:
        check("data.vocab", vocab, vocab >= 257, "at least 257, one token per byte and one for the end of a text")
    check("data.special", special, special in ("text", "tokens"), "text or tokens")
    if special == "tokens" and corpus.words:
        why, hint = "this data has a vocabulary of its own, without special tokens", "leave data.special out"
        raise UserError(option="data.special", got=special, why=why, hint=hint)
    settings["special"] = special
    settings |= {"tokenizer": tokenizer} if tokenizer else {"vocab": vocab}

    def make(temporary: Path) -> None:
        if tokenizer_of:
            settings["tokenizer"] = str(pack(tokenizer_of[0], cache, **tokenizer_of[1]).tokenizer)
        temporary.mkdir(parents=True)
        _write(temporary, corpus, announce=announce, code=code, **settings)

    folder = Path(cache) / key(corpus, **settings, tokenizer_of=tokenizer_of)
    if anew and code_of(folder) not in (None, code):
        _remove_old(folder, code)
    packed = once(folder, make)
    known = corpus.words or corpus.pairs or (read_json(packed.folder / "manifest.json") or {}).get("measured_bytes")
    if not known:  # packed before the bytes of the measured rows were counted
        console.print(
            "Bits per byte of this data may be off by some per cent, as they are from before the bytes of the rows "
            f"that are measured were counted. To count them, remove the data, which is then packed anew:\n"
            f"  {shlex.join(['rm', '-r', str(packed.folder)])}",
            soft_wrap=True,
        )  # fmt: skip
    return packed


def once(folder: Path, make: Callable[[Path], None]) -> Packed:
    """What is packed in a folder, filled by `make` under a temporary name where it is not there; one at a time."""
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not (folder / "manifest.json").exists():
                files.clear(folder.parent, folder.name)
                with files.atomic(folder) as temporary:
                    make(temporary)
    return opened(folder)


def code_of(folder: Path) -> dict[str, str] | None:
    """Return the digests of the source that packed data was made by; None of an earlier version, or of no data."""
    return (read_json(folder / "manifest.json") or {}).get("code")


def _remove_old(folder: Path, code: dict[str, str] | None) -> None:
    """Remove packed data that other code made."""
    with filelock.FileLock(f"{folder}.lock"):
        if code_of(folder) not in (None, code):
            files.remove(folder)


def opened(folder: Path) -> Packed:
    """What was packed into a folder; raises UserError if it is not what was written."""
    manifest = read_json(folder / "manifest.json") or {}
    if manifest.pop("digest", None) != files.digest_of(manifest):
        raise _damaged(folder, "manifest.json")
    for name, expected in manifest["digests"].items():
        if not (folder / name).exists() or files.digest(folder / name) != expected:
            raise _damaged(folder, name)
    train, val = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "val"))
    packed = Packed(
        folder, train, val, manifest["bytes_per_token"], manifest["entropy"], manifest["digests"],
        counts=manifest.get("counts", {}),
    )  # fmt: skip
    if "end" not in manifest:
        return replace(packed, boundary=tuple(manifest.get("boundary", ())))
    train_spans, val_spans = (np.load(folder / f"{part}_spans.npy") for part in ("train", "val"))
    end, template = manifest["end"], manifest["template"]
    return replace(packed, train_spans=train_spans, val_spans=val_spans, end=end, template=template)


def _damaged(folder: Path, name: str) -> UserError:
    return UserError(
        option=folder / name,
        why="is damaged: its bytes are not those that were written",
        hint="remove the packed data and type the same command again",
        commands=[shlex.join(["rm", "-r", str(folder)])],
    )


def _write(
    folder: Path, corpus: Corpus, seq_len: int, tokens: int | None, val_rows: int, val_share: float,
    vocab: int | None = None, tokenizer: str | None = None, special: str = "text", announce: bool = True,
    code: dict[str, str] | None = None,
) -> None:  # fmt: skip
    sides = _Sides(val_share)
    documents = _ordered(corpus, sides)
    fast = _tokenizer(corpus, documents, sides, vocab, tokenizer)
    fast.save_pretrained(folder / "tokenizer")
    if fast.eos_token_id is None and not corpus.words:
        raise UserError(
            option="data.tokenizer",
            got=tokenizer,
            why="has no token for the end of a text, which separates documents",
            hint="choose a tokenizer that has an eos_token",
        )
    write = _write_examples if corpus.pairs else _write_text
    about = write(folder, corpus, documents, sides, fast, seq_len, tokens or math.inf, val_rows, special == "tokens")
    worth_it = corpus.pairs or about["counts"]["left_out"].keys() - {"limit"} or about["counts"]["special_as_text"]
    if announce and worth_it:
        console.print(in_words(about["counts"]), soft_wrap=True)
    about |= {"source": corpus.fingerprint, "vocab": vocabulary_size(fast), "entropy": corpus.entropy}
    about |= {"code": code} if code else {}
    seal(folder, about)


def seal(folder: Path, about: dict) -> None:
    """Write the manifest of packed rows: what is said of them, and the digests of all files."""
    there = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json")
    manifest = about | {"digests": {str(p.relative_to(folder)): files.digest(p) for p in there}}
    files.write_json(folder / "manifest.json", manifest | {"digest": files.digest_of(manifest)})


def _write_text(
    folder: Path, corpus: Corpus, documents: Iterable[str], sides: _Sides, fast, seq_len: int, tokens: float,
    val_rows: int, special: bool,
) -> dict:  # fmt: skip
    """Write rows of documents that are joined, and return the manifest's entries about them."""
    dtype, counts, as_text = _dtype(fast), Counts("documents"), templates.special_as_text(fast, special)
    count, size = {"train": 0, "val": 0}, seq_len + 1
    # Of a stream the first validation rows, of a whole the same random ones, however much there is for training.
    limit = {"train": tokens, "val": val_rows * size if corpus.streaming else math.inf}
    end, bos = ([], []) if corpus.words else ([fast.eos_token_id], _announced_bos(fast, seq_len))
    with (
        open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val,
        open(folder / "val_bytes.bin", "wb") as val_bytes,
    ):  # fmt: skip
        out = {"train": train, "val": val}
        for batch in _batches(documents, 256):
            counts.read += len(batch)
            pairs = [(text, sides(text)) for text in batch if text.strip()]
            counts.left_out["empty"] += len(batch) - len(pairs)
            pairs = [(text, side) for text, side in pairs if count[side] < limit[side]]
            encoded = templates.tokens([text for text, _ in pairs], fast, special)
            for (text, side), ids in zip(pairs, encoded, strict=True):
                if count[side] < limit[side]:
                    part = _own(ids, end, bos) if special else slice(None)
                    if special and not ids[part]:
                        counts.left_out["empty"] += 1
                        continue
                    counts.used[side] += 1
                    counts.special_as_text += not corpus.words and as_text(text)
                    place = count[side] % size
                    row = _with_bos(ids[part] + end, bos, place, size)
                    np.array(row, dtype).tofile(out[side])
                    count[side] += len(row)
                    if side == "val" and not corpus.words:
                        spread = [*byte_counts(text, ids, fast)[part], *(0 for _ in end)]
                        np.array(_with_bos(spread, [0 for _ in bos], place, size), np.float32).tofile(val_bytes)
            if all(count[side] >= limit[side] for side in count):
                break
    for side in ("train", "val"):
        rows = int(min(count[side], limit[side] if side == "train" else math.inf)) // size
        if rows == 0:
            _too_short(count, size)
        counts.rows[side] = min(rows, val_rows) if side == "val" else rows
        taken = _save(folder, side, dtype, (rows, size), val_rows)
    counts.left_out["limit"] = counts.read - sum(counts.used.values()) - counts.left_out["empty"]
    about = {"counts": counts.as_dict(), "train_tokens": count["train"], "bytes_per_token": None}
    if not corpus.words:  # of the tokens that are measured: all but the first of a row, and those in front of a text
        measured = np.memmap(folder / "val_bytes.bin", np.float32, "r", shape=(rows, size))[taken, 1:]
        boundary = (*end, *bos)
        learned = measured.size - between(np.load(folder / "val.npy"), boundary).sum()
        about |= {"bytes_per_token": float(measured.sum(dtype=np.float64) / learned) or None, "measured_bytes": True}
        about |= {"boundary": boundary} if bos else {}
    (folder / "val_bytes.bin").unlink()
    return about


def _announced_bos(fast, seq_len: int) -> list[int]:
    """The tokens that the tokenizer puts in front of a text, of which one line is printed."""
    bos = bos_of(fast)
    if len(bos) > seq_len:
        why = f"the tokenizer puts {len(bos)} tokens in front of a text"
        raise UserError(option="data.seq_len", got=seq_len, why=why, need=f"at least {len(bos)}")
    if bos:
        names = " ".join(fast.convert_ids_to_tokens(bos))
        console.print(
            f"The tokenizer puts {names} in front of a text: here too, it is read and not learned.",
            soft_wrap=True,
        )  # fmt: skip
    return bos


def _own(ids: list[int], end: list[int], bos: list[int]) -> slice:
    """The part of a text without the tokens that are put around it anyway, where they are written out in it."""
    first = len(bos) if ids[: len(bos)] == bos else 0
    last = len(ids) - len(end) if end and ids[-len(end) :] == end else len(ids)
    return slice(first, max(first, last))


def _with_bos(tokens: list, bos: list, place: int, size: int) -> list:
    """A document with bos in front of it, and in front of all of it that begins a row.

    place: where in a row of `size` tokens the document begins. Every row then begins with bos, as a text of its own
    would.
    """
    if not bos:
        return tokens
    row, start = list(bos[: size - place]) if place else [], 0
    while start < len(tokens):
        if (place + len(row)) % size == 0:
            row += bos
        room = size - (place + len(row)) % size
        row += tokens[start : start + room]
        start += room
    return row


def _write_examples(
    folder: Path, corpus: Corpus, documents: Iterable[Example], sides: _Sides, fast, seq_len: int, tokens: float,
    val_rows: int, special: bool,
) -> dict:  # fmt: skip
    """Write rows of one response each, and their spans, and return the manifest's entries about them."""
    assert corpus.pairs, "a corpus of examples says how they become rows"
    most, date = corpus.pairs.prompt_len, corpus.pairs.date
    template = templates.template_of(corpus.pairs, documents, fast)
    templates.check_date(date, template, fast)
    if template != "chat":
        _announced_bos(fast, seq_len)
    end, size, dtype = templates.end_of_response(template, fast, date), seq_len + 1, _dtype(fast)
    as_text = templates.special_as_text(fast, special, template)
    spans: dict[str, list] = {"train": [], "val": []}
    heard: list[float] = []  # bytes of the responses of validation, as far as rows hold them
    counts, read = Counts("examples"), 0
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        out = {"train": train, "val": val}
        for batch in _batches(documents, 256):
            for example, rows in zip(batch, templates.encode(batch, template, fast, special, date), strict=True):
                counts.add(example, rows, as_text)
                for prompt, given, text, _ in rows:
                    response = _without_ends(given, end)
                    says = any(token not in (end, fast.eos_token_id) for token in given)
                    if not 0 < len(prompt) <= most or not (says or example.prompt_only):
                        reason = "prompt_too_long" if says or example.prompt_only else "no_response"
                        counts.left_out[reason if prompt else "no_prompt"] += 1
                        continue
                    side, whole = sides(example), [*prompt, *response, end]
                    row = whole[:size]
                    if side == "train":
                        read += len(row)
                        if read > tokens:  # what comes later may be shorter, but less is to be a part of more
                            counts.left_out["limit"] += 1
                            continue
                    else:
                        sizes = byte_counts(text, given, fast)[: len(response)]
                        heard.append(sizes[: size - len(prompt)].sum())
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
        taken = _save(folder, side, dtype, (len(of), size), val_rows)
        table = np.array(of, np.int32)[taken]
        np.save(folder / f"{side}_spans.npy", table)
    learned = (table[:, 1] - table[:, 0]).sum()  # of the validation rows
    return {
        "train_tokens": sum(total for _, total in spans["train"]),
        "bytes_per_token": float(np.array(heard)[taken].sum() / learned) or None,
        "template": template, "end": end, "counts": counts.as_dict(),
    }  # fmt: skip


def _without_ends(tokens: list[int], end: int | None) -> list[int]:
    """Tokens without those ends behind them that are written out."""
    count = len(tokens)
    while count and tokens[count - 1] == end:
        count -= 1
    return tokens[:count]


class Counts:
    """Numbers of what was read and what became of it. unit: of what is read, documents or examples."""

    def __init__(self, unit: str):
        self.unit, self.read, self.cut, self.special_as_text, self.prompts_only = unit, 0, 0, 0, 0
        self.used, self.rows = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        self.left_out: Counter[str] = Counter()  # by reason
        self.unlearned: Counter[str] = Counter()  # turns of the assistant, by reason
        self.unused: Counter[str] = Counter()  # columns and keys, by name

    def add(self, example: Example, rows: list[templates.Row], as_text: Callable[[str], bool]) -> None:
        """Count an example. as_text: see kd.data.templates.special_as_text."""
        self.read += 1
        self.unused.update(dict.fromkeys([*example.unused, *(name for row in rows for name in row.unused)], 1))
        self.unlearned.update(example.unlearned)
        if example.left_out:
            self.left_out[example.left_out] += 1
        self.prompts_only += example.prompt_only
        self.special_as_text += any(as_text(turn.content) for turn in example.turns)

    def as_dict(self) -> dict:
        """For a manifest, without reasons and names that have none."""
        return {name: {k: n for k, n in value.items() if n or name in ("used", "rows")} if isinstance(value, dict)
                else value for name, value in vars(self).items()}  # fmt: skip


def _dtype(fast) -> type:
    return np.uint16 if vocabulary_size(fast) <= 1 << 16 else np.uint32


def _save(folder: Path, side: str, dtype: type, shape: tuple[int, int], val_rows: int) -> np.ndarray | slice:
    """SIDE.bin as SIDE.npy, and which of its rows that takes."""
    taken = slice(None)
    if side == "val":  # a random part of the whole, so that one long document does not fill it
        taken = np.sort(np.random.default_rng(0).permutation(shape[0])[:val_rows])
    np.save(folder / f"{side}.npy", np.memmap(folder / f"{side}.bin", dtype, "r", shape=shape)[taken])
    (folder / f"{side}.bin").unlink()
    return taken


def _too_short(count: dict[str, int], size: int):
    raise UserError(
        f"the text gives {count['train']:,} tokens for training and {count['val']:,} for validation",
        need=f"{size:,} tokens of each, one row",
        hint="choose more text, shorter rows (data.seq_len=64), or more validation (data.val_share=0.2)",
    )


class _Sides:
    """Which side of the split a document is on, by its content, of an example by what is asked."""

    def __init__(self, val_share: float):
        self.bound = val_share * 2**64

    def __call__(self, document: str | Example) -> str:
        text = document if isinstance(document, str) else document.asked
        return "val" if xxhash.xxh3_64_intdigest(text.encode(), seed=1) < self.bound else "train"


def _ordered(corpus: Corpus, sides: _Sides):
    """All documents, shuffled by content; a stream stays as it is."""
    documents = corpus.load()
    if corpus.streaming:
        return documents
    digests, places, on = [], [], []
    again: Counter[int] = Counter()
    for document in documents:
        text = (document if isinstance(document, str) else document.content).encode()
        digest = xxhash.xxh3_64_intdigest(text)
        digests.append(digest)
        if not corpus.words:  # whose rows are documents
            again[digest] += 1
        if not (corpus.words or corpus.pairs):  # whose documents are joined
            on.append(sides(document) if document.strip() else "left out")
        # The first of equal documents where it would be alone, the others elsewhere.
        places.append(xxhash.xxh3_64_intdigest(text, seed=again[digest] - 1) if again[digest] > 1 else digest)
    order = sorted(range(len(places)), key=places.__getitem__)
    for side in {*on} - {"left out"}:
        of = [place for place, i in enumerate(order) if on[i] == side]
        for place, i in zip(of, _apart([order[place] for place in of], digests), strict=True):
            order[place] = i
    return _Reordered(documents, order)


def _apart(order: list[int], digests: list[int]) -> list[int]:
    """The order, but a document that follows one of the same digest comes behind the next other one, if there is one.

    The second pass, backwards, is for those that are left at the end.
    """
    for _ in range(2):
        apart: list[int] = []
        waiting: deque[int] = deque()  # all of the digest of the last
        for i in order:
            if apart and digests[apart[-1]] == digests[i]:
                waiting.append(i)
                continue
            apart.append(i)
            if waiting and digests[waiting[0]] != digests[i]:
                apart.append(waiting.popleft())
        order = [*apart, *waiting][::-1]
    return order


class _Reordered:
    def __init__(self, documents, order: list[int]):
        self.documents, self.order = documents, order

    def __iter__(self) -> Iterator:
        return (self.documents[i] for i in self.order)


def _tokenizer(corpus: Corpus, documents: Iterable, sides: _Sides, vocab: int | None, name: str | None):
    """The pretrained tokenizer `name`, one token per word, or byte-level BPE trained on up to 20 MB of the text."""
    from transformers import PreTrainedTokenizerFast

    if name and not corpus.words:
        return load_tokenizer(name, f"The tokenizer of {name}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if corpus.words:
        bpe = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*corpus.words, END])}, unk_token=END))
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

    template = templates.template_of(corpus.pairs, documents) if corpus.pairs else None

    def sample() -> Iterator[str]:
        read = 0
        for document in documents:
            if read >= 20_000_000:
                return
            if sides(document) == "train":
                text = document if template is None else templates.written(document, template)
                read += len(text)
                yield text

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def _batches(documents: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` documents, under a progress bar."""
    batch = []
    for document in track(documents, "reading text"):
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
