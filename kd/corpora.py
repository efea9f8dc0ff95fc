"""Where text comes from: each function here returns a Corpus. python and markov need no download."""

from __future__ import annotations

import glob
import os
import socket
import sys
import sysconfig
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import xxhash

from kd import files as on_disk
from kd.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Documents, and what says whether they are the same ones as before.

    entropy: nats per token that no model can beat, where it is known. words: the whole vocabulary, where words are the
    tokens and documents are rows as they stand; else a tokenizer is used and documents are joined.
    """

    load: Callable[[], Sequence[str] | Iterable[str]]
    fingerprint: dict
    streaming: bool = False
    entropy: float | None = None
    words: Sequence[str] | None = None
    pairs: bool = False


def python() -> Corpus:
    """The source of the Python standard library on this machine: some 600 files, 11 MB; one file is one document."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
    if not files:
        raise UserError(f"data=python: no source files in {root}. Choose other text, e.g. data=text data.files=my.txt.")
    documents = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    return Corpus(lambda: documents, {"name": "python", "content": _digest_all(documents)})


def markov(seq_len: int, size: int = 2_000_000, states: int = 128, branching: int = 8, seed: int = 0) -> Corpus:
    """A stationary first-order Markov chain: its entropy rate is what a perfect model reaches, exactly.

    From each of `states` states, `branching` successors with Dirichlet(1) probabilities. Every document is one row of
    seq_len + 1 tokens that starts in the stationary distribution; there are enough of them for `size` tokens.
    """
    for option, value, good in (
        ("states", states, states >= 2), ("branching", branching, 1 <= branching <= states),
        ("size", size, size > 0), ("seed", seed, seed >= 0), ("seq_len", seq_len, seq_len >= 1),
    ):  # fmt: skip
        if not good:
            raise UserError(
                f"data.{option}={value}: a Markov chain needs at least 2 states, branching from 1 to the number of "
                "states, a size and a seq_len above 0 and a seed that is not negative."
            )
    rng = np.random.default_rng(seed)
    successors = np.stack([rng.choice(states, branching, replace=False) for _ in range(states)])  # [S, branching]
    successors[:, 0] = (np.arange(states) + 1) % states  # one ring through all states: the chain is irreducible
    probability = rng.dirichlet(np.ones(branching), states)
    matrix = np.zeros((states, states))
    np.add.at(matrix, (np.arange(states)[:, None], successors), probability)
    stationary = np.linalg.lstsq(
        np.vstack([matrix.T - np.eye(states), np.ones(states)]), np.append(np.zeros(states), 1.0), rcond=None
    )[0].clip(0)
    stationary /= stationary.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -float(stationary @ np.nansum(matrix * np.log(matrix), 1))

    def documents() -> list[str]:
        rng_text = np.random.default_rng([seed, 1])
        count = -(-size // (seq_len + 1))
        state = rng_text.choice(states, count, p=stationary)
        columns = [state]
        cumulative = matrix.cumsum(1)
        for _ in range(seq_len):
            state = (rng_text.random((count, 1)) > cumulative[state]).sum(1).clip(max=states - 1)
            columns.append(state)
        return [" ".join(row) for row in np.array(words)[np.stack(columns, 1)]]

    words = [f"s{i}" for i in range(states)]
    fingerprint = dict(name="markov", seq_len=seq_len, size=size, states=states, branching=branching, seed=seed)
    return Corpus(documents, fingerprint, entropy=entropy, words=words)


def hub(
    name: str, subset: str | None = None, split: str = "train", field: str = "text", revision: str | None = None,
    streaming: bool = True,
) -> Corpus:  # fmt: skip
    """Any dataset of the Hugging Face Hub (or a local folder of one); streaming reads only as much as is needed."""

    def load() -> Iterable[str]:
        if not Path(name).is_dir():
            offline_unless_reachable()
        import datasets

        try:
            rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
        except Exception as error:  # of many kinds, from several libraries
            if isinstance(error, ValueError) or Path(name).is_dir():
                raise UserError(
                    f"data.name={name} data.subset={subset} data.split={split}: {_first_line(error)}"
                ) from error
            raise UserError(
                f"data.name={name}: could not be read from the Hugging Face Hub ({_first_line(error)}). Check the name "
                "and the network; private sets need `hf auth login`. Local text: data=text data.files=my.txt."
            ) from error
        return _column(rows, field, f"data.name={name}")

    if not name:
        raise UserError("data=hub needs the name of a dataset, e.g. data.name=roneneldan/TinyStories.")
    fingerprint = dict(name=name, subset=subset, split=split, field=field, revision=revision, streaming=streaming)
    if stamp := on_disk.stamp(name):
        fingerprint["content"] = stamp
    return Corpus(load, fingerprint, streaming=streaming)


@cache
def offline_unless_reachable() -> None:
    """Without a network, tell the Hugging Face libraries at once, instead of waiting a minute for their retries.

    What they have downloaded before still loads.
    """
    if urllib.request.getproxies():
        return
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
            if module in sys.modules:
                setattr(sys.modules[module], name, True)


def text(files: str, field: str = "text", sample_by: str = "paragraph") -> Corpus:
    """Local .txt, .jsonl or .parquet files (a path or a pattern); `field` holds the text of a JSONL or Parquet row.

    sample_by says what one document of a .txt is: paragraph, line or document (the whole file).
    """
    option = f"data.files={files}"
    paths = sorted(Path(p) for p in glob.glob(str(files), recursive=True)) if files else []
    if not paths:
        raise UserError(f"{option}: no such file. Type a path or a quoted pattern, e.g. \"data.files='text/*.txt'\".")
    kinds = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kind = {kinds.get(p.suffix) for p in paths}
    if len(kind) > 1 or None in kind:
        found = ", ".join(sorted({p.suffix or "no ending" for p in paths}))
        raise UserError(f"{option}: need files of one kind, .txt, .jsonl or .parquet; got {found}.")
    if sample_by not in ("paragraph", "line", "document"):
        raise UserError(f"data.sample_by={sample_by}: need paragraph, line or document.")
    builder = kind.pop()
    for path in paths:
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder. Type a pattern for the files in it, e.g. '{path}/*.txt'.")
        with open(path, "rb") as file:
            start = file.read(1 << 16)
        if not start:
            raise UserError(f"{option}: {path} is empty.")
        if builder != "parquet" and b"\0" in start:
            raise UserError(f"{option}: {path} is binary, not text.")

    def load() -> Iterable[str]:
        import datasets

        extra = {"sample_by": sample_by} if builder == "text" else {}
        try:
            rows = datasets.load_dataset(builder, data_files=[str(p) for p in paths], split="train", **extra)
        except Exception as error:  # pyarrow and datasets have many
            cause = error.__cause__ or error
            raise UserError(f"{option}: could not be read as {builder}: {_first_line(cause)}") from error
        return _column(rows, field, option)

    fingerprint = dict(
        field=field, sample_by=sample_by, files=[[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    )
    return Corpus(load, fingerprint)


def _column(rows, field: str, option: str) -> Iterable[str]:
    texts = _Texts(rows, field, option)
    names = rows.column_names or list(texts.first())
    if field not in names:
        raise UserError(f"{option}: has no column {field!r}; it has {', '.join(names)}. Type data.field=ONE_OF_THEM.")
    return texts


class _Texts:
    """One column of a `datasets` set: iterable, and indexable where the set is."""

    def __init__(self, rows, field: str, option: str):
        self.rows, self.field, self.option = rows, field, option

    def __len__(self) -> int:
        return len(self.rows)

    def first(self) -> dict:
        """The first row, {} if there is none."""
        return next(self._read(), {})

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._read())

    def __getitem__(self, index: int) -> str:
        return self._text(self.rows[index])

    def _read(self) -> Iterator[dict]:
        try:
            yield from self.rows
        except Exception as error:  # a stream finds damage, or loses its network, on the way
            raise UserError(f"{self.option}: could not be read: {_first_line(error.__cause__ or error)}") from error

    def _text(self, row: dict) -> str:
        if not isinstance(row[self.field], str):
            raise UserError(
                f"{self.option}: column {self.field!r} holds {type(row[self.field]).__name__} where it needs text. "
                "Type data.field=ANOTHER, or leave such rows out of the file."
            )
        return row[self.field]


def _digest_all(documents: Iterable[str]) -> str:
    state = xxhash.xxh3_128()
    for document in documents:
        state.update(document.encode() + b"\0")
    return state.hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
