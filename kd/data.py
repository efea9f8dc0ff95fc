"""From a corpus to batches.

1. documents  in an order made from their content, so that files of one kind do not stand together; streams as they come
2. split      a document belongs to validation if its hash says so: the same text never lands on both sides
3. tokens     by a tokenizer trained on the spot, or the pretrained model's own
4. rows       documents joined with an end-of-text token and cut into rows of T + 1 tokens, on disk, once, under a lock;
              prompts with responses (kd/instructions.py): each a row of its own, [prompt, response, end], padded with
              the end, and beside the rows where the prompt and all of it end
5. batches    which rows form step s is a pure function of (seed, s): runs with one seed see the same batches, and a
              resumed run goes on where it was. The shift happens here, once: labels[t] is the token after ids[t]; and
              the mask, once: by position, so a padding of ends hides no end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import xxhash

from kd import files, instructions
from kd.corpora import Corpus
from kd.errors import UserError
from kd.progress import console, track
from kd.run import read_json

FORMAT = 1  # of the packed rows; a new one makes new folders
END = "<|endoftext|>"
IGNORE = -100  # label of a position that is not counted


class Batch(NamedTuple):
    """One optimizer step, or a micro-batch of it, as tensors."""

    ids: object  # [B, T] int64
    labels: object  # [B, T] int64, already shifted; -100 = ignore
    row: object  # [B]    which row of the data
    seed: object  # [B, T] int64, a random number per position, for whatever samples
    stored: object = None  # what a store holds of these rows: Entries, or hidden states [B, T, D]
    sampled: object = None  # what is known of text that a model wrote: kd.generate.Sampled
    beside: object = None  # a Batch of plain text for the language-modelling term

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most `rows` sequences."""
        count = len(self.ids.split(rows))
        parts = [[None] * count if x is None else x.split(rows) for x in self]
        return (Batch(*part) for part in zip(*parts, strict=True))


@dataclass(frozen=True)
class Packed:
    """Tokenised rows on disk and what there is to know of them."""

    folder: Path
    train: np.ndarray  # [R, T + 1]
    val: np.ndarray  # [R', T + 1]
    bytes_per_token: float | None  # of the validation text; None where tokens are no text
    entropy: float | None  # nats per token, where it is known
    digests: dict[str, str]  # of all files
    # Of prompts with responses: tokens of the prompt, and all that are no padding; None where every token counts.
    train_spans: np.ndarray | None = None  # [R, 2] int32
    val_spans: np.ndarray | None = None  # [R', 2] int32
    end: int | None = None  # the token that ends a response

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def counted(self) -> float:
        """Tokens of a training row that are learned, in the mean."""
        if self.train_spans is None:
            return self.train.shape[1] - 1
        return float((self.train_spans[:, 1] - self.train_spans[:, 0]).mean())


def key(corpus: Corpus, **settings) -> str:
    """Name of the packed data: a digest of everything that its content depends on."""
    content = files.stamp(settings.get("tokenizer"))
    if of := settings.pop("tokenizer_of", None):
        settings["tokenizer_of"] = key(of[0], **of[1])
    return files.digest_of([FORMAT, corpus.fingerprint, settings, content])[:16]


def pack(
    corpus: Corpus, cache: Path, seq_len: int = 256, vocab: int = 1024, tokenizer: str | None = None,
    tokens: int | None = None, val_rows: int = 64, val_share: float = 0.05,
    tokenizer_of: tuple[Corpus, dict] | None = None,
) -> Packed:  # fmt: skip
    """The corpus as rows of seq_len + 1 tokens, made once and kept in `cache`.

    vocab: size of the tokenizer to train, unless `tokenizer` names a pretrained one, or it is that of other text,
    `tokenizer_of`, which is packed too. tokens: at most so many for training, padding not counted (a smaller amount is
    a part of a larger one). Raises UserError for text too short for one row.
    """
    settings = dict(seq_len=seq_len, tokens=tokens, val_rows=val_rows, val_share=val_share)
    for option, value in dict(seq_len=seq_len, val_rows=val_rows, tokens=tokens).items():
        least = seq_len + 1 if option == "tokens" else 1
        if value is not None and value < least:
            raise UserError(f"data.{option}={value}: need at least {least}{', one row' if least > 1 else ''}.")
    if not 0 < val_share < 1:
        raise UserError(f"data.val_share={val_share}: need a share of the documents between 0 and 1, e.g. 0.05.")
    if tokenizer is None and not corpus.words and vocab < 257:
        raise UserError(f"data.vocab={vocab}: need at least 257, one token per byte and one for the end of a text.")
    settings |= {"tokenizer": tokenizer} if tokenizer else {"vocab": vocab}

    def make(temporary: Path) -> None:
        if tokenizer_of:
            settings["tokenizer"] = str(pack(tokenizer_of[0], cache, **tokenizer_of[1]).tokenizer)
        temporary.mkdir(parents=True)
        _write(temporary, corpus, **settings)

    return once(Path(cache) / key(corpus, **settings, tokenizer_of=tokenizer_of), make)


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


def opened(folder: Path) -> Packed:
    """What was packed into a folder; raises UserError if it is not what was written."""
    again = f"Remove it and type the same command again:\n  rm -r {folder}"
    manifest = read_json(folder / "manifest.json")
    if manifest.pop("digest", None) != files.digest_of(manifest):
        raise UserError(f"{folder / 'manifest.json'} is damaged: it is not what was written. {again}")
    for name, expected in manifest["digests"].items():
        if not (folder / name).exists() or files.digest(folder / name) != expected:
            raise UserError(f"{folder / name} is damaged: it is not what was written. {again}")
    train, val = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "val"))
    of = manifest["bytes_per_token"], manifest["entropy"], manifest["digests"]
    if "end" not in manifest:
        return Packed(folder, train, val, *of)
    spans = (np.load(folder / f"{part}_spans.npy") for part in ("train", "val"))
    return Packed(folder, train, val, *of, *spans, manifest["end"])


def _write(
    folder: Path, corpus: Corpus, seq_len: int, tokens: int | None, val_rows: int, val_share: float,
    vocab: int | None = None, tokenizer: str | None = None,
) -> None:  # fmt: skip
    documents = _ordered(corpus)
    sides = _Sides(val_share)
    fast = _tokenizer(corpus, documents, sides, vocab, tokenizer)
    fast.save_pretrained(folder / "tokenizer")
    if fast.eos_token_id is None and not corpus.words:
        raise UserError(f"data.tokenizer={tokenizer}: has no token for the end of a text, which separates documents.")
    write = _write_examples if corpus.pairs else _write_text
    about = write(folder, corpus, documents, sides, fast, seq_len, tokens or math.inf, val_rows)
    seal(folder, {"source": corpus.fingerprint, "vocab": len(fast), "entropy": corpus.entropy, **about})


def seal(folder: Path, about: dict) -> None:
    """Write the manifest of packed rows: what is said of them, and the digests of all files."""
    there = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json")
    manifest = about | {"digests": {str(p.relative_to(folder)): files.digest(p) for p in there}}
    files.write_json(folder / "manifest.json", manifest | {"digest": files.digest_of(manifest)})


def _write_text(
    folder: Path, corpus: Corpus, documents: Iterable[str], sides: _Sides, fast, seq_len: int, tokens: float,
    val_rows: int,
) -> dict:  # fmt: skip
    """Rows of documents that are joined, and what the manifest says of them."""
    dtype = _dtype(fast)
    count, size, bytes_seen = {"train": 0, "val": 0}, seq_len + 1, 0
    # Of a stream the first validation rows, of a whole the same random ones, however much there is for training.
    limit = {"train": tokens, "val": val_rows * size if corpus.streaming else math.inf}
    end = [] if corpus.words else [fast.eos_token_id]
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        out = {"train": train, "val": val}
        for batch in _batches(documents, 256):
            pairs = [(text, sides(text)) for text in batch]
            pairs = [(text, side) for text, side in pairs if count[side] < limit[side]]
            encoded = instructions.tokens([text for text, _ in pairs], fast)
            for (text, side), ids in zip(pairs, encoded, strict=True):
                if count[side] < limit[side]:
                    np.array(ids + end, dtype).tofile(out[side])
                    count[side] += len(ids) + len(end)
                    bytes_seen += len(text.encode()) if side == "val" else 0
            if all(count[side] >= limit[side] for side in count):
                break
    for side in ("train", "val"):
        rows = int(min(count[side], limit[side] if side == "train" else math.inf)) // size
        if rows == 0:
            _too_short(count, size)
        _save(folder, side, dtype, (rows, size), val_rows)
    return {
        "train_tokens": count["train"],
        "bytes_per_token": None if corpus.words else bytes_seen / count["val"],
    }


def _write_examples(
    folder: Path, corpus: Corpus, documents: Iterable[instructions.Example], sides: _Sides, fast, seq_len: int,
    tokens: float, val_rows: int,
) -> dict:  # fmt: skip
    """Rows of one example each, their spans, and what the manifest says of them."""
    template, most = instructions.template_of(corpus.pairs, documents, fast), corpus.pairs.prompt_len
    end, size, dtype = instructions.end_of_response(template, fast), seq_len + 1, _dtype(fast)
    spans: dict[str, list] = {"train": [], "val": []}
    heard: list[float] = []  # bytes of the responses of validation, as far as rows hold them
    read, cut, left_out = 0, 0, {"too_long": 0, "empty": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        out = {"train": train, "val": val}
        for batch in _batches(documents, 256):
            for example, (prompt, response) in zip(batch, instructions.encode(batch, template, fast), strict=True):
                if not 0 < len(prompt) <= most:
                    left_out["too_long" if prompt else "empty"] += 1
                    continue
                side, row = sides(example), [*prompt, *response, end][:size]
                if side == "train":
                    read += len(row)
                    if read > tokens:  # what comes later may be shorter, but less is to be a part of more
                        continue
                else:
                    share = min(len(response), size - len(prompt)) / max(len(response), 1)
                    heard.append(share * len(example.response.encode()))
                np.array(row + [end] * (size - len(row)), dtype).tofile(out[side])
                spans[side].append((len(prompt), len(row)))
                cut += len(prompt) + len(response) + 1 > size
    examples = {side: len(of) for side, of in spans.items()}
    said = (
        f"{examples['train']:,} examples for training and {examples['val']:,} for validation; left out: "
        f"{left_out['too_long']:,} whose prompt has more than {most:,} tokens, {left_out['empty']:,} without prompt or "
        f"response; cut: {cut:,} responses that go beyond the {size:,} tokens of a row"
    )
    if not all(examples.values()):
        raise UserError(
            f"{said}. Each side needs one: give more examples, longer rows (data.seq_len=, data.prompt_len=), or more "
            "of them to validation (data.val_share=0.2)."
        )
    for side, of in spans.items():
        taken = _save(folder, side, dtype, (len(of), size), val_rows)
        table = np.array(of, np.int32)[taken]
        np.save(folder / f"{side}_spans.npy", table)
    console.print(said, soft_wrap=True)
    learned = (table[:, 1] - table[:, 0]).sum()  # of the validation rows
    return {
        "train_tokens": sum(total for _, total in spans["train"]),
        "bytes_per_token": float(np.array(heard)[taken].sum() / learned) or None,
        "template": template, "end": end, "examples": examples, "left_out": left_out, "cut": cut,
    }  # fmt: skip


def _dtype(fast) -> type:
    return np.uint16 if len(fast) <= 1 << 16 else np.uint32


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
        f"The text gives {count['train']:,} tokens for training and {count['val']:,} for validation, and one row needs "
        f"{size:,}. Choose more text, shorter rows (data.seq_len=64), or more validation (data.val_share=0.2)."
    )


class _Sides:
    """Which side of the split a document is on, by its content, of an example by what is asked."""

    def __init__(self, val_share: float):
        self.bound = val_share * 2**64

    def __call__(self, document: str | instructions.Example) -> str:
        text = document if isinstance(document, str) else document.asked
        return "val" if xxhash.xxh3_64_intdigest(text.encode(), seed=1) < self.bound else "train"


def _ordered(corpus: Corpus):
    """All documents, shuffled by content; a stream stays as it is."""
    documents = corpus.load()
    if corpus.streaming:
        return documents
    order = sorted(range(len(documents)), key=lambda i: xxhash.xxh3_64_intdigest(_content(documents[i]).encode()))
    return _Reordered(documents, order)


def _content(document: str | instructions.Example) -> str:
    return document if isinstance(document, str) else str(document[:-1])


class _Reordered:
    def __init__(self, documents, order: list[int]):
        self.documents, self.order = documents, order

    def __iter__(self) -> Iterator:
        return (self.documents[i] for i in self.order)


def _tokenizer(corpus: Corpus, documents: Iterable[str], sides: _Sides, vocab: int | None, name: str | None):
    """The pretrained tokenizer `name`, one token per word, or byte-level BPE trained on up to 20 MB of the text."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name and not corpus.words:
        from kd.models import from_hub

        return from_hub(AutoTokenizer, name, f"The tokenizer of {name}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if corpus.words:
        bpe = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*corpus.words, END])}, unk_token=END))
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

    template = instructions.template_of(corpus.pairs, documents) if corpus.pairs else None

    def sample() -> Iterator[str]:
        read = 0
        for document in documents:
            if read >= 20_000_000:
                return
            if sides(document) == "train":
                text = document if template is None else instructions.written(document, template)
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


def rows_of_step(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Which of `count` rows form optimizer step `step`, a pure function: every epoch is a new permutation [batch]."""
    place = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(place // count):
        here = place // count == epoch
        rows[here] = _permutation(count, seed, int(epoch))[place[here] % count]
    return rows


_kept: dict[tuple, np.ndarray] = {}


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    if (count, seed, epoch) not in _kept:
        _kept.clear()
        _kept[count, seed, epoch] = np.random.default_rng([seed, epoch]).permutation(count)
    return _kept[count, seed, epoch]


class Batches:
    """The training batches of steps start … steps - 1; iterating again begins at `start` again.

    among: which rows to take; None for all of them. read: what a store holds of rows (index [B], ids [B, T]). Batches
    are made ahead of their use, in a thread, so that no step waits for a disk. part: which rows of every batch. spans:
    of the rows [R, 2], where not all of them counts. beside: batches of plain text that go with these.
    """

    def __init__(
        self, rows: np.ndarray, batch: int, seed: int, start: int, steps: int,
        among: np.ndarray | None = None, read: Callable[[np.ndarray, np.ndarray], object] | None = None,
        part: slice = slice(None), spans: np.ndarray | None = None, beside: Batches | None = None,
    ):  # fmt: skip
        self.rows, self.batch, self.seed, self.start, self.steps = rows, batch, seed, start, steps
        self.among, self.read, self.part, self.spans, self.beside = among, read, part, spans, beside

    def __iter__(self) -> Iterator[Batch]:
        return ahead(map(self._make, range(self.start, self.steps)))

    def _make(self, step: int) -> Batch:
        count = len(self.rows if self.among is None else self.among)
        index = rows_of_step(count, self.batch, self.seed, step)
        if self.among is not None:
            index = self.among[index]
        shape = (self.batch, self.rows.shape[1] - 1)
        seed = np.random.default_rng([self.seed, step, 1]).integers(0, 2**62, shape)[self.part]
        index = index[self.part]
        batch = to_batch(self.rows[index], index, seed, None if self.spans is None else self.spans[index])
        if self.read is not None:
            batch = batch._replace(stored=self.read(index, batch.ids.numpy()))
        return batch if self.beside is None else batch._replace(beside=self.beside._make(step))


def ahead(items: Iterator, count: int = 2) -> Iterator:
    """The items, made in a thread of their own while those before are used."""
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item


class ValidationBatches:
    """The validation rows, in order, `batch` at a time. part: which of them. passes: at least so many batches, where
    those without a row have one that does not count. spans: of the rows [R, 2], where not all of them counts.
    """

    def __init__(
        self, rows: np.ndarray, batch: int, part: slice = slice(None), passes: int = 0, spans: np.ndarray | None = None
    ):
        self.rows, self.batch, self.spans = rows, batch, spans
        self.index, self.passes = np.arange(len(rows))[part], passes

    def __len__(self) -> int:
        return max(self.passes, -(-len(self.index) // self.batch))

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.index), self.batch):
            index = self.index[start : start + self.batch]
            yield self._make(index)
        for _ in range(-(-len(self.index) // self.batch), self.passes):
            batch = self._make(np.zeros(1, np.int64))
            yield batch._replace(labels=batch.labels.fill_(IGNORE))

    def _make(self, index: np.ndarray) -> Batch:
        seed = np.zeros((len(index), self.rows.shape[1] - 1), np.int64)
        return to_batch(self.rows[index], index, seed, None if self.spans is None else self.spans[index])


def to_batch(rows: np.ndarray, index: np.ndarray, seed: np.ndarray, spans: np.ndarray | None = None) -> Batch:
    """Rows [B, T + 1] and a random number per position [B, T] -> Batch; inputs and labels are shifted only here.

    spans [B, 2]: tokens of the prompt, and all that are no padding; what is not between them does not count.
    """
    import torch

    tokens = torch.from_numpy(rows.astype(np.int64))
    labels = tokens[:, 1:].clone()  # of a single row, contiguous() would be no copy
    if spans is not None:
        first, end = torch.from_numpy(spans.astype(np.int64)).T[..., None]  # [B, 1]
        place = torch.arange(1, tokens.shape[1])  # of a label in its row
        labels[(place < first) | (place >= end)] = IGNORE
    return Batch(tokens[:, :-1].contiguous(), labels, torch.from_numpy(index), torch.from_numpy(seed))
