"""Sources of text: each function here returns a Corpus. python and markov need no download."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from kd.data.tables import Documents, Joined, cache_of, is_saved, kind_of, local_tables, saved_rows, stamps
from kd.errors import UserError, check, first_line, typed
from kd.system import files as on_disk
from kd.system.network import offline_unless_reachable


class Pairs(NamedTuple):
    """Settings for the conversion of prompts and responses to rows; see kd/data/templates.py."""

    template: str | None  # None takes what is usual for the documents and the tokenizer
    prompt_len: int  # tokens; a longer prompt is left out
    date: str | None = None  # in place of today, for chat templates that write it


@dataclass(frozen=True)
class Corpus:
    """Documents, with a fingerprint of their content.

    entropy: lowest possible loss in nats per token, if known. words: the whole vocabulary of a corpus whose tokens are
    words and whose documents are rows; without it, a tokenizer is used and documents are joined. pairs: for documents
    that are prompts with responses (kd.data.examples.Example) instead of text, each a row of its own.
    """

    load: Callable[[], Iterable]  # a sequence, unless streaming
    fingerprint: dict
    streaming: bool = False
    entropy: float | None = None
    words: Sequence[str] | None = None
    pairs: Pairs | None = None


ROWS = 2  # since empty documents are left out, and equal ones no longer lie side by side


def python() -> Corpus:
    """The source of the Python standard library on this machine: some 600 files, 11 MB; one file is one document."""
    documents = standard_library()
    fingerprint: dict = {"name": "python", "content": digest_all(documents)}
    if len(set(documents)) < len(documents) or not all(map(str.strip, documents)):
        fingerprint["version"] = ROWS
    return Corpus(lambda: documents, fingerprint)


def standard_library() -> list[str]:
    """Return the source files of this machine's Python, without tests, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
    if not files:
        hint = "choose other text, e.g. data=text data.files=my.txt"
        raise UserError(option=root, why="has no source files of Python", hint=hint)
    return [f.read_text(encoding="utf-8", errors="replace") for f in files]


def markov(seq_len: int, size: int = 2_000_000, states: int = 128, branching: int = 8, seed: int = 0) -> Corpus:
    """A stationary first-order Markov chain: its entropy rate is what a perfect model reaches, exactly.

    From each of `states` states, `branching` successors with Dirichlet(1) probabilities. Every document is one row of
    seq_len + 1 tokens that starts in the stationary distribution; there are enough of them for `size` tokens.
    """
    check("data.states", states, states >= 2, "at least 2 states of the Markov chain")
    check("data.branching", branching, 1 <= branching <= states, f"from 1 to data.states={states} successors")
    check("data.size", size, size > 0, "at least 1 token")
    check("data.seed", seed, seed >= 0, "a number from 0 on")
    check("data.seq_len", seq_len, seq_len >= 1, "at least 1 token")
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
        return _column(hub_rows(name, subset, split, revision, streaming), None, field, f"data.name={name}")

    if not name:
        hint = "type e.g. data.name=roneneldan/TinyStories"
        raise UserError(option="data.name", why="is not set", need="the name of a dataset for data=hub", hint=hint)
    fingerprint: dict = dict(name=name, subset=subset, split=split, field=field, revision=revision, streaming=streaming)
    fingerprint["version"] = ROWS
    if stamp := on_disk.folder_fingerprint(name):
        fingerprint["content"] = stamp
    return Corpus(load, fingerprint, streaming=streaming)


def hub_rows(name: str, subset: str | None, split: str, revision: str | None, streaming: bool = False):
    """Return the rows of a dataset of the Hub or a folder; raise UserError, which names the option, if it fails."""
    if not Path(name).is_dir():
        offline_unless_reachable()
    import datasets

    on_disk.check_cache(datasets.config.HF_DATASETS_CACHE, "HF_HOME")
    try:
        if is_saved(name):
            return saved_rows(name, subset, split, revision, streaming)
        cache = cache_of(content) if (content := on_disk.folder_fingerprint(name)) else None
        return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming, cache_dir=cache)
    except Exception as error:  # of many kinds, from several libraries
        if isinstance(error, ValueError) or Path(name).is_dir():
            of_files = Path(name).is_dir() and not is_saved(name)
            files = f"if columns differ between its files, type data.files='{name}/*.jsonl'" if of_files else ""
            raise UserError(
                option="data.name",
                got=name,
                conflict=f"data.subset={typed(subset)} data.split={split}",
                why=first_line(error),
                hint=files or "choose a name, subset and split that go together",
            ) from error
        raise UserError(
            option="data.name",
            got=name,
            why=f"could not be read from the Hugging Face Hub ({first_line(error)})",
            hint="check the name and the network; private sets need `hf auth login`. For local files type data=text "
            "data.files=my.txt, or data=instructions data.files=my.jsonl",
        ) from error


def text(files: str, field: str = "text", sample_by: str = "paragraph") -> Corpus:
    """Local .txt, .jsonl or .parquet files (a path or a pattern); `field` holds the text of a JSONL or Parquet row.

    sample_by says what one document of a .txt is: paragraph, line or document (the whole file).
    """
    units = ("paragraph", "line", "document")
    check("data.sample_by", sample_by, sample_by in units, "paragraph, line or document")
    paths, builder = local_files(files, {".txt": "text", ".md": "text"} | TABLES)
    extra = {"sample_by": sample_by} if builder == "text" else {}
    fingerprint = dict(field=field, sample_by=sample_by, files=stamps(paths), version=ROWS)

    def load() -> Joined:
        tables = local_tables(files, paths, builder, **extra)
        sources = [None] if builder == "text" else paths  # a table holds all files of plain text
        return Joined([_column(*pair, field, f"data.files={files}") for pair in zip(tables, sources, strict=True)])

    return Corpus(load, fingerprint)


TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # what `datasets` reads files of columns as


def local_files(files: str, kinds: dict[str, str]) -> tuple[list[Path], str]:
    """Return the files of a path or pattern, and their common kind out of `kinds` (ending -> kind).

    Raises UserError, which names the file, if there is no file, a file of another kind, or one without text.
    """
    option = f"data.files={files}"
    paths = _matching(str(files)) if files else []
    if not paths:
        example = f"\"data.files='text/*{next(iter(kinds))}'\""
        hint = f"type a path or a quoted pattern, e.g. {example}"
        raise UserError(option="data.files", got=files, why="no such file", hint=hint)
    for path in filter(is_saved, paths):
        why, hint = f"{path} is a folder of save_to_disk", f"type data.name={path} in place of data.files"
        raise UserError(option=option, why=why, hint=hint)
    builder, *others = {kinds.get(p.suffix) for p in paths}
    if others or builder is None:
        endings = ", ".join(sorted({p.suffix or "no ending" for p in paths}))
        raise UserError(option=option, why=f"got files of {endings}", need=f"files of one kind, {', '.join(kinds)}")
    for path in paths:
        if path.is_dir():
            hint = f"type a pattern for the files in it, e.g. '{path}/*.txt'"
            raise UserError(option=option, why=f"{path} is a folder", hint=hint)
        with open(path, "rb") as file:
            start = file.read(1 << 16)
        if not start:
            raise UserError(option=option, why=f"{path} is empty", hint="leave this file out")
        if builder != "parquet" and b"\0" in start:
            raise UserError(option=option, why=f"{path} is binary, not text", hint="leave this file out")
    return paths, builder


def _matching(files: str) -> list[Path]:
    """Return the files of a path or pattern. A name with brackets is no pattern if a file of that name exists."""
    if Path(files).exists():
        return [Path(files)]
    names = glob.glob(files, recursive=True) or glob.glob(files.replace("[", "[[]"), recursive=True)
    return sorted(map(Path, names))


def _column(rows, file: Path | None, field: str, option: str) -> Documents:
    def text(row: dict) -> str:
        if not isinstance(value := row.get(field), str):
            raise UserError(
                option=option,
                why=f"column {field!r} holds {kind_of(value)}",
                need="text in each row",
                hint="type data.field=ANOTHER, or leave such rows out of the file",
            )
        return value

    texts = Documents(rows, text, option, file)
    if field not in texts.columns:
        why = f"has no column {field!r}, only {', '.join(texts.columns)}"
        raise UserError(option=option, why=why, hint="type data.field=ONE_OF_THEM")
    return texts


def digest_all(documents: Iterable[str]) -> str:
    """Return the xxh3-128 digest of texts in their order."""
    state = xxhash.xxh3_128()
    for document in documents:
        state.update(document.encode() + b"\0")
    return state.hexdigest()
