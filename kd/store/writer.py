"""How a store comes to be: written by a finished teacher, shard by shard, or recorded while a teacher trains.

Every file is written to a temporary name and renamed, then a note with its size and digest beside it; the manifest
comes last. A shard that has its note is never written again, so a killed writer goes on where it was, and several
writers share the work by taking shards that no other holds.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kd.data.batches import IGNORE, Batch, Packed, to_batch
from kd.errors import UserError
from kd.objective.chunked import Signal, chunks, fitting
from kd.objective.signals import ProjectedSignal
from kd.objective.target import Target
from kd.parallel import collectives
from kd.store.format import Positions, encode, to_bytes
from kd.store.reader import quoted, row_hash, said
from kd.system import files
from kd.system.console import Steps, clock, console, counted, track
from kd.system.files import read_json
from kd.system.hardware import hold_in, keep_freed
from kd.system.remote import Remote
from kd.teachers.base import Teacher

SHARD_TOKENS, SHARD_BYTES = 1 << 20, 1 << 28  # a shard holds at most so many positions, or bytes of hidden states
SHARDS = 8  # at least so many where there are rows enough, so that a killed writer loses little


class Rows:
    """Rows of a shard to be, in memory."""

    def __init__(self) -> None:
        self.hashes: list[int] = []
        self._bodies: list[Tensor | Future[bytes]] = []
        # Rows are compressed while the next ones are computed: beside an H200 it takes half of the forward pass's time.
        self._compression = ThreadPoolExecutor(2, "compression")
        self.rows: list[int] = []
        self.steps: list[int] = []
        self.positions, self.entries, self.mass = 0, 0, 0.0

    def add(self, ids: np.ndarray, hidden: Tensor) -> None:
        """Rows ids [B, T] and the teacher's last hidden states [B, T, D]."""
        self.hashes += map(row_hash, ids)
        self._bodies += hidden.cpu()
        self.positions += ids.size

    def add_entries(self, ids: np.ndarray, pieces: list[Positions], kept: np.ndarray) -> None:
        """Rows ids [B, T] and entries of those of their positions that are kept [B, T], in order."""
        self.hashes += map(row_hash, ids)
        columns = ("count", "log_odds", "gap", "code")
        count, log_odds, gap, code = (np.concatenate([getattr(p, c).cpu().numpy() for p in pieces]) for c in columns)
        self.positions += len(count)
        self.entries += len(gap)
        self.mass += float(torch.from_numpy(log_odds).double().sigmoid().sum())
        count, log_odds = _spread(count, kept, 0), _spread(log_odds, kept, -np.inf)
        ends = count.sum(1).cumsum()
        for row, (start, end) in enumerate(zip([0, *ends], ends)):
            columns = count[row], log_odds[row], gap[start:end], code[start:end]
            self._bodies.append(self._compression.submit(to_bytes, *columns))

    @property
    def bodies(self) -> list[Tensor | bytes]:
        """Hidden states, or the compressed entries, of each row."""
        return [body.result() if isinstance(body, Future) else body for body in self._bodies]

    @property
    def bytes(self) -> int:
        return sum(b.nbytes if isinstance(b, Tensor) else len(b) for b in self.bodies)

    def save(self, folder: Path, name: str, **note) -> None:
        """As NAME.safetensors with a note."""
        tensors = {"hash": torch.tensor(self.hashes)}
        if self.rows:
            tensors |= {"row": torch.tensor(self.rows), "step": torch.tensor(self.steps)}
        bodies = self.bodies
        if isinstance(bodies[0], Tensor):
            tensors["hidden"] = torch.stack(bodies)
        else:
            tensors["offset"] = torch.tensor([0, *map(len, bodies)]).cumsum(0)
            tensors["entries"] = torch.frombuffer(bytearray(b"".join(bodies)), dtype=torch.uint8)
        counts = dict(count=len(self.hashes), positions=self.positions, entries=self.entries, mass=self.mass)
        _save(tensors, folder, name, **counts, **note)


def _spread(values: np.ndarray, kept: np.ndarray, filler: float) -> np.ndarray:
    """Values [N] in the places where kept [B, T] is true, and the filler in all others."""
    whole = np.full(kept.shape, filler, values.dtype)
    whole[kept] = values
    return whole


def _save(tensors: dict[str, Tensor], folder: Path, name: str, **note) -> None:
    """NAME.safetensors, and then NAME.json, which says that it is whole."""
    with files.atomic(folder / f"{name}.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors leaves it to its owner alone, and a store is for all
        note |= {"size": temporary.stat().st_size, "digest": files.digest(temporary)}
    files.write_json(folder / f"{name}.json", note)


def begin(folder: Path, of: dict, **about) -> None:
    """Say in `folder` what the store is to be; raises UserError if it holds the beginning of another one."""
    begun = read_json(folder / "begun.json")
    if begun is None:
        files.write_json(folder / "begun.json", {"of": of, **about})
    elif begun["of"] != of:
        begun = begun["of"]
        field = next(f for f in of if begun.get(f) != of[f])
        raise UserError(
            option=folder,
            why=f"holds the beginning of another store: its {field} is {said(begun.get(field))}, and here it is "
            f"{said(of[field])}",
            hint="choose another folder, or remove this one",
            commands=[shlex.join(["rm", "-r", str(folder)])],
        )
    elif begun.get("shards") != about.get("shards"):
        raise UserError(
            option=folder,
            why="was begun by a version of kd that cut the data into other shards",
            hint="remove this folder",
            commands=[shlex.join(["rm", "-r", str(folder)])],
        )


def _note(folder: Path, name: str) -> dict | None:
    """What is known of a file that was written whole; None if it is to be written."""
    try:
        note = read_json(folder / f"{name}.json")
    except UserError:
        return None
    return note if (folder / f"{name}.safetensors").exists() else None


def _notes(folder: Path) -> dict[str, dict]:
    """The same of all files that are there, by name."""
    names = sorted(p.stem for p in folder.glob("*.safetensors"))
    return {name: note for name in names if (note := _note(folder, name))}


def commit(folder: Path, of: dict, about: dict) -> None:
    """Write the manifest, which makes the store whole."""
    notes = {f"{name}.safetensors": note for name, note in _notes(folder).items()}
    shards = [note for name, note in notes.items() if name.startswith("shard-")]
    sums = {key: sum(note[key] for note in shards) for key in ("count", "entries", "mass", "size")}
    sums["positions"] = sum(note.get("positions", note["count"] * about["seq_len"]) for note in shards)
    manifest = {"of": of, **about, **sums, "files": notes}
    files.write_json(folder / "manifest.json", manifest | {"digest": files.digest_of(manifest)})


class RowEncoder:
    """Teacher in front of a store: its signal for rows of the data, as the store holds it.

    spec: what the store is of. truncate: what to keep of a target, leaving its probabilities true; None to keep hidden
    states, from which the output layer makes all of it.
    """

    def __init__(
        self, teacher: Teacher, spec: dict, truncate: Callable[[Target], Target] | None, device: torch.device
    ):  # fmt: skip
        if teacher.model is None:
            raise UserError(
                option="teacher",
                why="has no model in this process, and a store holds a teacher's output layer and hidden states of the "
                "validation rows",
                hint="type logits=online to learn from the teacher directly",
            )
        self.teacher, self.spec, self.truncate, self.device = teacher, spec, truncate, device
        self.head = teacher.model.head
        # Hidden states in the precision that the output layer computes with lose nothing.
        self.dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32

    @classmethod
    def finished(
        cls, teacher: Teacher, spec: dict, truncate: Callable[[Target], Target] | None, accelerator: str
    ) -> RowEncoder:
        """Return the encoder of a teacher that learns no more, on the device and in the precision of training."""
        device = collectives.device(accelerator)
        if teacher.frozen:
            teacher.frozen.to(device)
            if spec["precision"] == "bf16":
                hold_in(torch.bfloat16, teacher.frozen)
        return cls(teacher, spec, truncate, device)

    def signal(
        self, table: np.ndarray, index: np.ndarray, spans: np.ndarray | None = None, boundary: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, Signal]:
        """Return tokens [B, T] of rows `index` of the data, the mask of target positions, and the signal for these."""
        # Seeds by row, so that draws depend neither on the batch nor on the shard.
        shape, first = table.shape[1] - 1, self.spec["seed"] or 0
        seed = np.stack([np.random.default_rng([first, int(row)]).integers(0, 2**62, shape) for row in index])
        cpu = to_batch(table[index], index, seed, None if spans is None else spans[index], boundary)
        batch = Batch(*(x.to(self.device) for x in cpu[:4]))
        mask = batch.labels != IGNORE
        return cpu.ids.numpy(), mask.cpu().numpy(), self.teacher.signal(batch, mask)

    def computing(self):
        """Return the context with the precision that the store is to be computed in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.inference_mode()
    def encode(
        self, table: np.ndarray, index: np.ndarray, out: Rows, spans: np.ndarray | None = None,
        boundary: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Put rows `index` of the data into `out`. spans, boundary: see kd.data.batches.to_batch."""
        if self.truncate is None:
            return self.encode_complete(table, index, out)
        with self.computing():
            ids, mask, signal = self.signal(table, index, spans, boundary)
            if isinstance(signal, ProjectedSignal):
                self._check_finite(signal.features, index, mask)
            draws, pieces = self.spec["truncation"].get("draws"), []
            for part in chunks(int(mask.sum()), fitting(self.head)):
                pieces.append(encode(self.truncate(signal(part)), draws))
            out.add_entries(ids, pieces, mask)

    @torch.inference_mode()
    def encode_complete(self, table: np.ndarray, index: np.ndarray, out: Rows) -> None:
        """Put rows `index` of the data into `out` as hidden states, those of all positions, whichever count."""
        with self.computing():
            ids, mask, signal = self.signal(table, index)
            if not isinstance(signal, ProjectedSignal):
                raise UserError(
                    option="teacher",
                    why="has a signal without hidden states, and a store holds those of the validation rows",
                    hint="type logits=online to learn from the teacher directly",
                )
            self._check_finite(signal.features, index, mask)
            out.add(ids, signal.features.view(*ids.shape, -1).to(self.dtype))

    def _check_finite(self, features: Tensor, index: np.ndarray, mask: np.ndarray) -> None:
        finite = features.isfinite().all(-1).cpu().numpy()  # [N]
        if not finite.all():
            row = index[mask.nonzero()[0][~finite][0]]
            raise UserError(
                option="teacher",
                why=f"has NaN or infinity in its hidden states for row {row} of the data, in {self.spec['precision']}. "
                "The row was not stored",
                hint="type trainer.precision=fp32, or choose another teacher",
            )

    def save_head(self, folder: Path) -> None:
        """Save the output layer."""
        weights = {k: v[: self.head.vocab].to(self.dtype) for k, v in self.head.output.state_dict().items()}
        _save(weights, folder, "head")

    def save_validation(self, folder: Path, rows: np.ndarray, batch: int) -> None:
        """Save the hidden states of the validation rows."""
        out = Rows()
        for part in chunks(len(rows), batch):
            self.encode_complete(rows, np.arange(part.start, part.stop), out)
        out.save(folder, "validation")


def write(
    folder: Path, of: dict, about: dict, packed: Packed, encoder: RowEncoder, batch: int, part: tuple[int, int] = (1, 1)
) -> None:
    """Write what is missing of the store that `of` describes, together with whatever other process does the same.

    batch: rows per forward pass. part: which of how many machines that do not share a disk; with more than one there
    is no manifest before merge(). Raises UserError if there is no room.
    """
    rows, size = packed.train.shape
    shards = _cut(rows, size, encoder)
    begin(folder, of, about=about, shards=list(shards))
    if encoder.device.type == "cpu":
        keep_freed()
    mine = dict(list(shards.items())[part[0] - 1 :: part[1]])
    left = {name: rows for name, rows in mine.items() if _note(folder, name) is None}
    if left:
        _announce(folder, encoder, packed, batch, sum(map(len, left.values())))
    progress = Steps(f"store of {of['teacher']}", sum(map(len, left.values())), 0, "row")
    done = 0

    def make(name: str) -> None:
        nonlocal done
        files.clear(folder, f"{name}*")
        if name == "head":
            return encoder.save_head(folder)
        if name == "validation":
            return encoder.save_validation(folder, packed.val, batch)
        out = Rows()
        for piece in chunks(len(left[name]), batch):
            index = np.array(left[name][piece])
            encoder.encode(packed.train, index, out, spans=packed.train_spans, boundary=packed.boundary)
            done += piece.stop - piece.start
            progress.update(done, done * (packed.train.shape[1] - 1))
        out.save(folder, name, first=left[name].start)

    try:
        # First what no other process holds; then wait for the others, and do what a dead one has left.
        for wait in (False, True):
            for name in [*(["head", "validation"] if part[0] == 1 else []), *left]:
                with _claim(folder / f".{name}.lock", wait) as held:
                    if held and _note(folder, name) is None:
                        make(name)
    finally:
        progress.stop()
    if part[1] == 1:
        commit(folder, of, files.load_json(folder / "begun.json")["about"])
        for lock in folder.glob(".*.lock"):
            lock.unlink(missing_ok=True)


def _cut(rows: int, size: int, encoder: RowEncoder) -> dict[str, range]:
    """Which rows form which shard: of the data and the teacher alone, so that all writers cut alike."""
    most = SHARD_TOKENS // size
    if encoder.truncate is None:
        most = SHARD_BYTES // (encoder.dtype.itemsize * size * encoder.head.output.weight.shape[1])
    each = max(1, min(most, -(-rows // SHARDS)))
    starts = range(0, rows, each)
    return {f"shard-{number:05}": range(first, min(first + each, rows)) for number, first in enumerate(starts)}


class Takes(NamedTuple):
    """What rows of a store take."""

    tokens: int  # that are stored
    size: float  # bytes
    beside: int  # bytes of the output layer and the validation rows
    seconds: float


def takes(encoder: RowEncoder, packed: Packed, batch: int, rows: float) -> Takes:
    """What so many rows like those that are packed take, by the example of one batch."""
    output, each = encoder.head.output, packed.counted if encoder.truncate else packed.train.shape[1] - 1
    beside = sum(p.numel() for p in output.parameters()) + packed.val[:, 1:].size * output.weight.shape[1]
    for _ in range(2):  # the first forward pass is slower
        out, started = Rows(), time.monotonic()
        index = np.arange(min(batch, len(packed.train)))
        encoder.encode(packed.train, index, out, spans=packed.train_spans, boundary=packed.boundary)
    seconds, tokens = (time.monotonic() - started) / len(out.bodies) * rows, rows * each
    return Takes(round(tokens), out.bytes / out.positions * tokens, beside * encoder.dtype.itemsize, seconds)


def _announce(folder: Path, encoder: RowEncoder, packed: Packed, batch: int, rows: int) -> None:
    """Say what is to be written and how long it takes; raises UserError without room."""
    tokens, size, beside, seconds = takes(encoder, packed, batch, rows)
    beside *= _note(folder, "head") is None
    free = shutil.disk_usage(folder).free
    say = (
        f"{tokens:,} tokens at about {size / tokens:,.0f} bytes each, {files.amount(size)} in all, and "
        f"{files.amount(beside)} of output layer and validation rows; "
        f"{files.amount(free)} are free in {folder}"
    )
    if 1.1 * (size + beside) > free:
        raise UserError(
            option=folder,
            why=f"has no room for the store: {say}",
            hint="keep less of each position (e.g. record=top_k record.k=20), take less text (data.tokens=…), or "
            "choose another disk with logits.path=…",
        )
    console.print(f"Writing {say}; {clock(seconds)} if no one helps.", soft_wrap=True)


@contextmanager
def _claim(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process, and no other, holds the lock."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def merge(folder: Path, parts: list[Path]) -> None:
    """Join in `folder` what several machines wrote.

    Raises UserError if the parts are not of one store, if one is damaged, or if a shard is missing.
    """
    begun: dict[Path, dict] = {}
    for part in parts:
        of = read_json(part / "begun.json")
        if of is None:
            why, hint = "is no part of a store: the folder has no begun.json", "give the folders of the parts"
            raise UserError(option=part, why=why, hint=hint)
        if "shards" not in of:
            why = "was recorded in training, by one process: there is nothing to merge"
            raise UserError(option=part, why=why, hint="use this folder as a store as it is")
        begin(folder, **of)
        begun[part] = of
    notes = {name: (part, note) for part in parts for name, note in _notes(part).items()}
    missing = [name for name in ("head", "validation", *begun[parts[0]]["shards"]) if name not in notes]
    if missing:
        words = quoted(begun[parts[0]]["about"]["words"])
        raise UserError(
            f"{counted(len(missing), 'file is', 'files are')} in none of the parts, {missing[0]}.safetensors among "
            "them",
            hint="give the part that has these files, or write that part, where NUMBER is the number of the part",
            commands=[f"python -m kd.store write {words} part=NUMBER/OF"],
        )
    for name, (part, note) in track(notes.items(), "merging"):
        source = part / f"{name}.safetensors"
        with files.atomic(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
            if files.digest(temporary) != note["digest"]:
                why, hint = "is damaged: its bytes are not those that were written", "copy that file again"
                raise UserError(option=source, why=why, hint=hint)
        files.write_json(folder / f"{name}.json", note)
    commit(folder, begun[parts[0]]["of"], begun[parts[0]]["about"])


def upload(folder: Path, url: str) -> None:
    """Copy a whole store to a URL, the manifest last."""
    manifest = files.load_json(folder / "manifest.json")
    there = read_json(files.fetch(url, folder, "manifest.json"))
    if there and there["of"] != manifest["of"]:
        raise UserError(
            option=url,
            why=f"holds another store, of {there['of']['teacher']}",
            hint=f"choose another URL for the store in {folder}",
        )
    if there:
        return  # another machine was first
    remote = Remote(url, folder)
    try:
        left = [name for name, note in manifest["files"].items() if not _is_sent(remote, name, note)]
        for name in track([*left, "manifest.json"], f"copying to {url}"):
            remote.put(name)
    except UserError as error:
        raise UserError(
            option=url,
            why=f"the store is whole in {folder}, and could not be copied there: {error}",
            hint="type the same command again to continue copying",
        ) from error


def _is_sent(there: Remote, name: str, note: dict) -> bool:
    """Whether a file is at a URL already, where Recorder.send puts a note behind each."""
    return there.read(f"{name.partition('.')[0]}.json") == note
