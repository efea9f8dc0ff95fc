"""Offline logits: a teacher's signal for every row of some packed data, in a folder or under an fsspec URL.

begun.json              specification of the store, written first
shard-00000.safetensors rows of the data: token hashes, and per row its entries (kd/store/format.py); in a full store
                        the teacher's last hidden states, from which the output layer makes complete distributions
shard-00000.json        size and digest of the file of that name; written once the file is complete, then never again
head.safetensors        the teacher's output layer
validation.safetensors  the teacher's hidden states of the validation rows, so that metrics use complete distributions
manifest.json           size and digest of every file; written last, once the store is complete
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from kd.config import components as conf
from kd.data.batches import Batch
from kd.errors import UserError
from kd.models.causal_lm import Head
from kd.models.flops import Cost
from kd.objective import truncation
from kd.objective.chunked import Signal
from kd.objective.signals import ProjectedSignal
from kd.objective.target import Target
from kd.store.format import EncodedRows
from kd.store.location import FORMAT
from kd.store.shard import Shard, collate_rows
from kd.store.spec import (
    FULL,
    NOT_NESTED,
    are_comparable,
    before_manifest,
    check_manifest,
    covers,
    describe,
    draws_of,
    row_hash,
)
from kd.system import files, programs
from kd.system.console import track
from kd.system.files import read_json
from kd.system.remote import is_default_root, is_url, local_root


class Store:
    """Complete store. Opening reads its manifest only; each file is checked when it is first used.

    path: folder or URL. cache: folder for local copies of files from a URL.
    """

    def __init__(self, path: str | Path, cache: Path):
        self.path, self.folder, self.cache = str(path), files.local_path(path, cache), Path(cache)
        self.manifest = before_manifest(self.folder)
        copy = files.download(self.path, self.folder, "manifest.json")
        try:
            manifest = read_json(copy)
        except UserError:
            manifest = {}
        if manifest is None:
            raise UserError(
                option=self.path,
                why="is no store: the folder has no manifest.json, which is written last",
                hint="to write the store, or to continue writing it, type",
                commands=[self._command()],
            )
        if manifest.pop("digest", None) != files.digest_of(manifest):
            raise self._damaged("manifest.json", "it is not what was written")
        try:
            check_manifest(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged("manifest.json", f"it is not what kd writes ({error})") from None
        self.manifest, self.spec, self.words = manifest, manifest["of"], manifest["words"]
        if self.spec["format"] != FORMAT:
            raise UserError(
                option=self.path,
                why=f"has format {self.spec['format']}, and this version of kd reads format {FORMAT}",
                hint="write the store again, in another folder",
                commands=[f"{programs.command('store')} write {self.words} logits.path=FOLDER"],
            )
        self.truncation, self.draws = self.spec["truncation"], draws_of(self.spec["truncation"])
        notes = {name: note for name, note in manifest["files"].items() if name.startswith("shard-")}
        self.shards = sorted(notes, key=lambda name: notes[name].get("first", notes[name].get("steps")))
        self.first = np.array([notes[name].get("first", 0) for name in self.shards])
        self._checked: set[str] = set()
        self._open: dict[str, Shard] = {}
        self._head: Head | None = None
        self._rows: np.ndarray | None = None  # of a store that was recorded in training: those of the window, ascending
        self._places: np.ndarray | None = None  # and the number of the shard of each, and its place there
        if not is_url(self.path):
            for name in manifest["files"]:
                self._size(name)

    def check(self, expected: dict, by_path: bool = True, nested: Mapping[str, str] = NOT_NESTED) -> None:
        """Raise UserError, naming the field, if the store belongs to another config.

        A field that is None on either side is skipped. by_path: True if the store was requested by its path. nested: as
        of covers().
        """
        pairs = {f: (self.spec.get(f), value) for f, value in expected.items() if f != "truncation"}
        differing = [
            f"its {field} is {describe(stored)}, and here it is {describe(value)}"
            for field, (stored, value) in pairs.items()
            if None not in (stored, value) and stored != value
        ]
        if differing:
            refusal = UserError(option=self.path, why=f"does not belong to this config: {'; '.join(differing)}")
            if not by_path:  # the path is that of a store of this config
                hint = "to have the store written anew, type this, and then the same command again"
                raise refusal.replace(hint=hint, commands=(shlex.join(["rm", "-r", str(self.folder)]),))
            hint = "leave logits.path out, so that a store of this config is found or written, or type the words that "
            raise refusal.replace(hint=f"{hint}this store was written with", commands=(self.words,))
        requested = expected["truncation"]
        if covers(self.truncation, requested, nested):
            return
        if not are_comparable(self.truncation, requested, nested):
            raise UserError(
                option="truncation",
                got=describe(requested),
                why=f"may need more than {self.path} holds, which is {describe(self.truncation)}",
                need="the truncation of the store, or one that declares by @nested which part of it serves",
                hint="leave logits.path out, so that a store of this truncation is found or written; for a plug-in of "
                "yours, declare it (docs/extending.md)",
            )
        raise UserError(
            option="truncation",
            got=describe(requested),
            why=f"needs more than {self.path} holds, which is {describe(self.truncation)}",
            hint="choose a truncation that keeps a part of that, or have a store written that holds more: leave "
            "logits.path out, and type e.g. record=top_k record.k=100",
        )

    def verify(self) -> None:
        """Digest all files. Raises UserError, naming the file, at the first that has changed since it was written."""
        self._checked.clear()
        for name, note in track(self.manifest["files"].items(), "checking the store"):
            self._file(name)
            self._check_same(f"{name.partition('.')[0]}.json", note)
        self._check_same("begun.json", self.spec, "of")

    def _check_same(self, name: str, expected: dict, key: str | None = None) -> None:
        """Raise UserError if a file that only writers read exists and contradicts the manifest."""
        try:
            note = read_json(self.folder / name)
            matches = note is None or (note[key] if key else note) == expected
        except (UserError, KeyError):
            matches = False
        if not matches:
            raise self._damaged(name, "it is not what was written")

    def select_window(self, window: tuple[float, float] | None) -> np.ndarray | None:
        """Return the rows that have logits, ascending; None for all. window: share of the teacher's training to read.

        Raises UserError for a window of a store that was not recorded in training, or with no row in it.
        """
        if "steps" not in self.manifest:
            if window is not None:
                raise UserError(
                    option="logits.window",
                    got=window,
                    why=f"{self.path} was written by a finished teacher and covers no window of its training",
                    hint="leave logits.window out, or give a store that a teacher's own run wrote with record=…",
                )
            return None
        low, high = (share * self.manifest["steps"] for share in window or (0, 1))
        rows, places = [], []
        for number, name in enumerate(self.shards):
            begin, end = self.manifest["files"][name]["steps"]
            if begin < high and end > low:
                shard = self._shard(name)
                assert shard.rows is not None and shard.steps is not None, "a shard was recorded in training steps"
                chosen = np.flatnonzero((shard.steps >= low) & (shard.steps < high))
                rows.append(shard.rows[chosen])
                places.append(np.stack([np.full(len(chosen), number), chosen], 1))
        if not rows or not sum(map(len, rows)):
            raise UserError(
                option="logits.window",
                got=window,
                why="no step of the teacher's training is in this window",
                hint="choose a wider window",
            )
        # If a row was trained on more than once, its last record counts.
        recorded, locations = np.concatenate(rows)[::-1], np.concatenate(places)[::-1]
        self._rows, first = np.unique(recorded, return_index=True)
        self._places = locations[first]
        return self._rows

    def read(self, index: np.ndarray, ids: np.ndarray) -> Tensor | EncodedRows:
        """Return entries, or in a full store hidden states [B, T, D], of rows index [B] with the tokens ids [B, T].

        Raises UserError if the store was written for other tokens.
        """
        stored_rows = []
        for row, tokens in zip(index, ids, strict=True):
            name, place = self._place(int(row))
            shard = self._shard(name)
            if shard.hashes[place] != row_hash(tokens):
                raise self._other_tokens(int(row))
            stored_rows.append(shard.row(place))
        return collate_rows(stored_rows)

    def signal(self, batch: Batch, mask: Tensor) -> Signal:
        """Return the stored signal at the target positions of a batch. Its rows come from read()."""
        label, seed = batch.labels[mask], batch.position_seeds[mask]
        if self.truncation == FULL:
            assert isinstance(batch.teacher_rows, Tensor), "a complete store has hidden states"
            return ProjectedSignal(self.head.to(label.device), batch.teacher_rows[mask].float(), label, seed)
        assert isinstance(batch.teacher_rows, EncodedRows), "a truncated store has entries"
        positions = batch.teacher_rows.at(mask)
        return lambda rows: positions.target(rows, label[rows], seed[rows], self.draws)

    def reference(self, batch: Batch, mask: Tensor) -> Signal:
        """Return complete distributions at the target positions of validation rows."""
        shard = self._shard("validation.safetensors")
        for row, ids in zip(batch.row_ids.tolist(), batch.ids.cpu().numpy(), strict=True):
            if shard.hashes[row] != row_hash(ids):
                raise self._other_tokens(row, "validation ")
        hidden = torch.stack([shard.row(row) for row in batch.row_ids.tolist()]).to(batch.ids.device).float()
        return ProjectedSignal(
            self.head.to(hidden.device), hidden[mask], batch.labels[mask], batch.position_seeds[mask]
        )

    @property
    def cost(self) -> Cost:
        """Return the cost of the teacher that wrote the store."""
        return Cost(**self.manifest["cost"])

    @property
    def head(self) -> Head:
        """Return the teacher's output layer."""
        if self._head is None:
            path = self._file("head.safetensors")
            try:
                weights = {k: v.float() for k, v in load_file(path).items()}
            except safetensors.SafetensorError as error:
                raise self._damaged(path.name, f"it is no file of tensors ({error})") from None
            vocab, width = weights["weight"].shape
            output = torch.nn.Linear(width, vocab, bias="bias" in weights, device="meta")
            output.load_state_dict(weights, assign=True)
            self._head = Head(output.requires_grad_(False), vocab, **self.manifest["head"])
        return self._head

    def truncation_for(self, requested: dict, function: Callable[[Target], Target]) -> Callable[[Target], Target]:
        """Return the function that truncates a stored target as requested.

        `function` does so for a complete target.
        """
        if self.truncation == FULL:
            return function
        if requested == self.truncation:  # truncated already, by exact probabilities
            return truncation.full
        if self.draws:
            return partial(truncation.subsample, self.draws, requested["draws"])
        return function

    def _place(self, row: int) -> tuple[str, int]:
        if "steps" in self.manifest:
            if self._rows is None:  # no window was selected
                self.select_window(None)
            assert self._rows is not None and self._places is not None, "a window is picked"
            number, place = self._places[np.searchsorted(self._rows, row)]
            return self.shards[number], place
        number = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.shards[number], row - int(self.first[number])

    def _shard(self, name: str) -> Shard:
        if name not in self._open:
            path = self._file(name)
            try:
                self._open[name] = Shard(path)
            except safetensors.SafetensorError as error:
                raise self._damaged(name, f"it is no file of tensors ({error})") from None
        return self._open[name]

    def _file(self, name: str) -> Path:
        """Return the path of a file on this machine, with checked content."""
        path = files.download(self.path, self.folder, name)
        if name in self._checked:
            return path
        try:
            self._check_digest(name, path)
        except UserError:
            if not is_url(self.path):
                raise
            path.unlink(missing_ok=True)  # the copy may be stale or damaged while the original is intact
            self._check_digest(name, files.download(self.path, self.folder, name))
        self._checked.add(name)
        return path

    def _check_digest(self, name: str, path: Path) -> None:
        """Raise UserError unless a file has the bytes that were written."""
        self._size(name)
        if files.digest(path) != self.manifest["files"][name]["digest"]:
            raise self._damaged(name, "its bytes are not those that were written")

    def _size(self, name: str) -> None:
        path, expected = self.folder / name, self.manifest["files"][name]["size"]
        size = path.stat().st_size if path.exists() else None
        if size != expected:
            raise self._damaged(name, "it is gone" if size is None else f"it has {size:,} bytes of {expected:,}")

    def _damaged(self, name: str, why: str) -> UserError:
        if is_url(self.path):
            (self.folder / name).unlink(missing_ok=True)  # the local copy, so that the next read downloads it again
        stem = name.partition(".")[0]
        paths = shlex.join(str(self.folder / n) for n in dict.fromkeys(("manifest.json", f"{stem}.json", name)))
        damaged = UserError(option=f"{self.path}/{name}", why=f"is damaged: {why}")
        if is_url(self.path) or "words" not in self.manifest or "steps" in self.manifest:
            return damaged.replace(hint="copy that file again from its source: it cannot be made again here")
        commands = (f"rm -f {paths}", self._command())
        return damaged.replace(hint="to write that file anew, and no other, type", commands=commands)

    def _command(self) -> str:
        """Return the command that writes this store, here."""
        if "words" not in self.manifest:
            return f"{programs.command('store')} write and the words of the run that reads it"
        words, key, root = [self.manifest["words"]], self.manifest.get("key", ""), str(self.cache.parent)
        location = self.path.removesuffix(f"/stores/{key}")
        if is_url(location) and local_root(location) == self.cache.parent:
            root = location
        elif self.folder != self.cache / key:
            words.append(shlex.quote(f"logits.path={conf.typed(self.path)}"))
        if not is_default_root(root):
            words.append(shlex.quote(f"root={conf.typed(root)}"))
        return f"{programs.command('store')} write {' '.join(words)}"

    def _other_tokens(self, row: int, part: str = "") -> UserError:
        return UserError(
            option=self.path,
            why=f"was written for other tokens: those of {part}row {row} differ from this data's",
            hint="use the data that the store was written with, or leave logits.path out to have a store of this data "
            "written",
        )
