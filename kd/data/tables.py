"""Tables of local files and of the Hugging Face Hub: rows by column, read as they stand."""

from __future__ import annotations

import datetime
import glob
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.errors import UserError, first_line
from kd.system import files as on_disk


class Documents:
    """Rows of a table, turned into documents by `make`: iterable, and indexable where the table is.

    A UserError of `make` is raised with the row's place in front of its reason. file: of the table, if it is one.
    """

    def __init__(self, rows, make: Callable[[dict], Any], option: str, file: Path | None = None):
        self.rows, self.make, self.option, self.file = rows, make, option, file
        self.columns = rows.column_names or list(self.first())
        if not self.columns:
            why = "has no row with a named column"
            raise UserError(option=option, why=why, hint="give files that have rows")

    def __len__(self) -> int:
        return len(self.rows)

    def first(self) -> dict:
        """Return the first row, {} if there is none."""
        return next(self._read(), {})

    def __iter__(self) -> Iterator:
        return (self._document(index, row) for index, row in enumerate(self._read()))

    def __getitem__(self, index: int):
        return self._document(index, self.rows[index])

    def _document(self, index: int, row: dict):
        try:
            return self.make(row)
        except UserError as error:
            place = self.rows.place(index) if isinstance(self.rows, JsonRows) else f"row {index + 1}"
            named = self.file is None or self.option == f"data.files={self.file}"
            place += "" if named else f" of {self.file}"
            raise error.replace(why=f"in {place}, {error.why}") from error

    def _read(self) -> Iterator[dict]:
        try:
            yield from self.rows
        except Exception as error:  # a stream finds damage, or loses its network, on the way
            why = f"could not be read: {first_line(error.__cause__ or error)}"
            raise UserError(option=self.option, why=why) from error


class Joined:
    """Documents of several tables, one after the other."""

    def __init__(self, parts: Sequence[Documents]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator:
        for part in self.parts:
            yield from part

    def __getitem__(self, index: int):
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.parts[part][index - int(self.starts[part])]


class JsonRows:
    """Rows of a .jsonl or .json file, without the guesses of other readers: a date stays text, no key is filled in.

    A file is a list of objects, or an object per line. Lines are parsed when they are asked for. Raises ValueError,
    naming the line, for anything else.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.rows: list[dict] | None = None
        columns: dict[str, None] = {}
        start = 3 if self.text[:3] == b"\xef\xbb\xbf" else 0
        if self.text[start : start + 4096].lstrip()[:1] == b"[":
            self.rows = [self._row(row, f"{path}, row {i}") for i, row in enumerate(_parsed(self.text[start:]), 1)]
            for row in self.rows:
                columns |= dict.fromkeys(row)
        else:
            self.spans = []
            self.text.seek(start)
            for number, line in enumerate(iter(self.text.readline, b""), 1):
                if line.strip():
                    try:
                        row = _parsed(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: {error}") from None
                    columns |= dict.fromkeys(self._row(row, f"{path}, line {number}"))
                    self.spans.append((self.text.tell() - len(line), self.text.tell()))
            self.spans = np.array(self.spans, np.int64).reshape(-1, 2)
        if not columns:
            raise ValueError(f"{path}: it has no row with a named column")
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self.spans if self.rows is None else self.rows)

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        if self.rows is not None:
            return self.rows[index]
        start, end = self.spans[index]
        return _parsed(self.text[start:end])

    def place(self, index: int) -> str:
        """Return the place of a row in the file, counted from 1; empty lines count too."""
        if self.rows is not None:
            return f"row {index + 1}"
        before = self.text[: self.spans[index][0]].count(b"\n")
        return f"line {before + 1}"

    @staticmethod
    def _row(row, place: str) -> dict:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {type(row).__name__}, and each row must be an object with named columns")
        return row


def _parsed(text: bytes):
    value = json.loads(text)
    if b"\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError for half a character
    return value


def local_tables(files: str, paths: list[Path], builder: str, **options) -> list:
    """Return the tables of local files, one per file with named columns; raise UserError if one cannot be read."""
    groups = [paths] if builder == "text" else [[path] for path in paths]
    tables = []
    for group in groups:
        try:
            tables.append(JsonRows(group[0]) if builder == "json" else _loaded(builder, group, **options))
        except UserError:
            raise
        except Exception as error:  # pyarrow and datasets have many
            cause = error.__cause__ or error
            why = f"could not be read as {builder}: {first_line(cause)}"
            raise UserError(option="data.files", got=files, why=why) from error
    return tables


def _loaded(builder: str, paths: list[Path], **options):
    import datasets

    on_disk.check_cache(datasets.config.HF_DATASETS_CACHE, "HF_HOME")
    names = [glob.escape(str(path)) for path in paths]  # of files, where datasets expects patterns
    cache = cache_of(stamps(paths))
    return datasets.load_dataset(builder, data_files=names, split="train", cache_dir=cache, **options)


def stamps(paths: list[Path]) -> list:
    """Return the names of files, and digests of their content."""
    return [[str(p), on_disk.known_digest(p)] for p in paths]


def cache_of(content: str | list) -> str:
    """Return the cache folder for `datasets`, by content: `datasets` tells local files apart by name and mtime only."""
    import datasets

    return f"{datasets.config.HF_DATASETS_CACHE}/kd-{on_disk.digest_of(content)[:16]}"


def is_saved(name: str | Path) -> bool:
    """True for a folder that was written by save_to_disk() of datasets."""
    return any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))


def saved_rows(name: str, subset: str | None, split: str, revision: str | None, streaming: bool):
    """Return the rows of a folder of save_to_disk(); raise ValueError for a part that it does not have."""
    import datasets

    for option, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise ValueError(f"a folder of save_to_disk has no {option}; leave data.{option} out")
    rows = datasets.load_from_disk(name)
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"it has the splits {', '.join(rows)}; type data.split=ONE_OF_THEM")
        rows = rows[split]
    elif split != "train":
        raise ValueError("it has no splits; leave data.split out")
    return rows.to_iterable_dataset() if streaming else rows


def kind_of(value) -> str:
    """Return the kind of a value, for an error message."""
    if isinstance(value, datetime.date | datetime.time):
        return f"{type(value).__name__} (a .jsonl file that is named by data.files= is read without guesses of dates)"
    return type(value).__name__
