"""A root under an fsspec URL: what is worked on is a folder of this machine, and what counts is there.

Nothing is renamed there, as object stores cannot: a checkpoint is objects of names of its own, and then a note with
their digests, without which they are not a checkpoint; a run is done by its result.json, written last.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath

from kd import files
from kd.errors import UserError
from kd.progress import console
from kd.signals import requests

# These have no folders to be made, and some of their clients would make a bucket.
OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}
ASK_AGAIN = 5  # seconds: what was not there is not asked for sooner


def is_url(root: str | Path) -> bool:
    return "://" in str(root)


def home(root: str | Path) -> Path:
    """The folder of a root on this machine: the root itself, or of a URL a folder in $KD_CACHE or ~/.cache/kd."""
    if not is_url(root):
        return Path(root)
    cache = files.cache()
    files.check_cache(cache, "KD_CACHE")
    return files.local(str(root).rstrip("/"), cache)


def latest(root: str | Path, name: str) -> Path:
    """A file of a root, on this machine: copied anew if the root is a URL; it may not exist."""
    path = home(root) / name
    if is_url(root):
        Remote(str(root), home(root)).get(name)
    return path


def publish(root: str | Path, name: str) -> None:
    """Copy a file of home(root) to a root that is a URL."""
    if is_url(root):
        Remote(str(root), home(root)).put(name)


class Remote:
    """A folder under a URL, and its copy on this machine. All methods raise UserError where the URL fails."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url.rstrip("/"), folder
        self.lost = False  # whether another machine works on it now
        self._seen: dict[str, tuple] = {}
        self._thread = None
        self._sending: Future | None = None

    @cached_property
    def _at(self) -> tuple:
        """The file system, and the path in it."""
        import fsspec  # takes its time, which a folder has no use for

        system, path = fsspec.core.url_to_fs(self.url)
        return system, path.rstrip("/")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors for people: every system has errors of its own."""
        try:
            yield
        except UserError:
            raise
        except ImportError as error:  # fsspec says which package
            raise UserError(f"{self.url} could not be {what}: {error}, with pip install.") from error
        except FileNotFoundError as error:
            raise UserError(f"{self.url} could not be {what}: {error}. Is its bucket or server there?") from error
        except PermissionError as error:
            raise UserError(
                f"{self.url} could not be {what}: no access ({error}). Give the credentials that its package reads."
            ) from error
        except Exception as error:
            raise UserError(f"{self.url} could not be {what}: {type(error).__name__}: {error}") from error

    def read(self, name: str) -> dict | None:
        """A JSON file there, or None if there is none."""
        with self._told("read"):
            system, path = self._at
            try:
                return json.loads(system.cat_file(f"{path}/{name}"))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise UserError(f"{self.url}/{name} is damaged ({error}). Remove it to make it again.") from None

    def now_and_then(self, name: str) -> dict | None:
        """The same for who asks all the time: anew after some seconds, or when this machine wrote of the run."""
        local = self.folder / "state.json"
        written = local.stat().st_mtime_ns if local.exists() else 0
        seen = self._seen.get(name)
        done = seen and seen[2] and name == "result.json"  # which never changes
        if not done and (seen is None or seen[1] != written or time.monotonic() - seen[0] > ASK_AGAIN):
            self._seen[name] = seen = (time.monotonic(), written, self.read(name))
        return seen[2]

    def forget(self) -> None:
        """Ask anew, whatever was there a moment ago."""
        self._seen.clear()

    def get(self, name: str) -> bool:
        """Copy a file from there; whether there is one. Raises UserError for a name of a place outside."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{self.url} names a file outside of itself, {name}; nothing was copied there.")
        with self._told("read"):
            system, path = self._at
            try:
                with files.atomic(self.folder / name) as temporary:
                    system.get_file(f"{path}/{name}", str(temporary))
            except FileNotFoundError:
                (self.folder / name).unlink(missing_ok=True)
                return False
        return True

    def names(self, name: str = "") -> list[str]:
        """All files there below a folder, as they are named from the URL."""
        with self._told("read"):
            system, path = self._at
            system.invalidate_cache()
            below = f"{path}/{name}".rstrip("/")
            found = system.find(below) if system.exists(below) else []
            return sorted(str(x).removeprefix(path).lstrip("/") for x in found)

    def put(self, *names: str) -> None:
        """Copy files, and all files of folders, there; what does not exist is left out."""
        with self._told("written"):
            for name in names:
                found = self.folder / name
                for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
                    inner = file.relative_to(self.folder)
                    passing = any(part.endswith((".tmp", ".lock")) for part in inner.parts)
                    if file.is_file() and not file.is_symlink() and not passing:
                        self._put(str(file), inner.as_posix())

    def _put(self, file: str, name: str) -> None:
        system, path = self._at
        self._make_parent(name)
        system.put_file(file, f"{path}/{name}")

    def write(self, name: str, value: dict) -> None:
        """value as a JSON file there."""
        with self._told("written"):
            system, path = self._at
            self._make_parent(name)
            system.pipe_file(f"{path}/{name}", (json.dumps(value, indent=1) + "\n").encode())

    def _make_parent(self, name: str) -> None:
        system, path = self._at
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if not OBJECTS & protocols:
            system.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)

    def remove(self, *names: str) -> None:
        with self._told("written"):
            system, path = self._at
            for name in names:
                if system.exists(f"{path}/{name}"):
                    system.rm(f"{path}/{name}", recursive=True)

    def tell(self, *names: str) -> None:
        """put() of what can wait: a failure is said and not raised."""
        try:
            if not self.lost:
                self.put(*names)
        except UserError as error:
            warnings.warn(f"{error}\nWhat is not there is in {self.folder}; it is copied the next time.")

    # Checkpoints

    def pull_checkpoint(self, step: int) -> bool:
        """Copy the newest whole checkpoint of a later step, with the metrics up to it; whether there is one.

        Warns of each that is damaged; raises UserError if there are some and all are, and none is here (step < 0).
        """
        notes = sorted((x for x in self.names("checkpoints") if x.endswith(".json")), reverse=True)
        notes = [name for name in notes if step_of(name) > step]
        for name in notes:
            try:
                note = self.read(name)
                if all(self._pull(part, of) for part, of in note["files"].items()):
                    # First the metrics: without the digest there is no checkpoint yet that goes with them.
                    os.replace((self.folder / name).with_suffix(".jsonl"), self.folder / "metrics.jsonl")
                    (self.folder / name).with_suffix(".xxh3").write_text(note["digest"])
                    return True
            except (KeyError, TypeError, AttributeError):  # not what was written
                pass
            warnings.warn(f"{self.url}/{name} is of a damaged checkpoint; going back to the one before.")
        if notes and step < 0:
            raise UserError(
                f"Every checkpoint of this run is damaged: {', '.join(f'{self.url}/{x}' for x in notes)}. Remove "
                f"{self.url}/checkpoints to train it anew."
            )
        return False

    def _pull(self, name: str, digest: str) -> bool:
        """Copy a file; whether it is what was written."""
        return self.get(name) and files.digest(self.folder / name) == digest

    def send_checkpoint(self, path: Path, first: Callable[[], None] | None, writing: Future | None) -> None:
        """Copy a checkpoint there, beside the training; what is on its way is waited for before.

        first: what has to be there before it. writing: what gives the checkpoint its name, if it has none yet.
        """
        self.finish_sending()
        self._thread = self._thread or ThreadPoolExecutor(1, "remote")
        self._sending = self._thread.submit(self._send, path, first, writing)

    def finish_sending(self) -> None:
        """Wait for the checkpoint on its way; warns if it did not arrive."""
        sending, self._sending = self._sending, None
        if sending is None:
            return
        try:
            sending.result()
        except UserError as error:
            warnings.warn(f"{error}\nThat checkpoint is here alone; the next one is copied again.")

    def _send(self, path: Path, first: Callable[[], None] | None, writing: Future | None) -> None:
        if writing:
            wait([writing])  # what goes wrong with it is said where it was asked for
        if self.lost or not path.exists():
            return
        if first:
            first()
        step, name = step_of(path.name), f"checkpoints/{path.stem}"
        whole = [x for x in (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True) if x.endswith("\n")]
        metrics = self.folder / f"{name}.jsonl"
        with files.atomic(metrics) as temporary:  # of the steps that are not run again
            temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        parts = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        parts = [p.relative_to(self.folder).as_posix() for p in (*parts, metrics)]
        digests = {p: files.digest(self.folder / p) for p in parts}
        self.put(*parts, "metrics.jsonl", "state.json")
        metrics.unlink()
        self.write(f"{name}.json", {"files": digests, "digest": path.with_suffix(".xxh3").read_text()})
        there = self.names("checkpoints")
        for note in sorted((x for x in there if x.endswith(".json") and step_of(x) <= step), reverse=True)[2:]:
            self.remove(note)  # first, so that no note is without its files
        stems = {x.partition(".")[0] for x in self.names("checkpoints") if x.endswith(".json")}
        self.remove(*(x for x in there if x.partition(".")[0] not in stems and not x.endswith(".json")))

    # Who works on it

    @contextmanager
    def lease(self, me: dict, alive: Callable[[dict], bool], patient: bool) -> Iterator[None]:
        """Only one machine works on it: who holds lease.json, until it was not renewed for EXPIRES seconds.

        me: this process, as alive() takes it. patient: wait for another one, instead of raising UserError.
        """
        mine, said, seen, renewed = me | {"id": uuid.uuid4().hex, "beat": 0}, False, None, False
        while not self._take(mine):
            there = self.read("lease.json")
            if there is None:
                continue
            if seen is None or there != seen[0]:
                renewed = seen is not None
                seen = there, time.monotonic()
            here = (there["host"], there["boot"]) == (me["host"], me["boot"])
            if (here and not alive(there)) or time.monotonic() - seen[1] > EXPIRES:
                self.write("lease.json", mine)
                time.sleep(SETTLES)  # of several who find it free, the last to write has it
                if (self.read("lease.json") or {}).get("id") == mine["id"]:
                    break
                continue
            used = f"{self.url} is being worked on by process {there['pid']} on {there['host']}"
            if not patient and (here or renewed):
                raise UserError(f"{used}. Wait for it to end: the same command then shows its result.")
            if not said:
                until = "waiting for it" if patient else f"it is taken over if that says nothing for {EXPIRES} seconds"
                console.print(f"{used}; {until}.", soft_wrap=True)
            said = True
            time.sleep(POLL)
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(mine, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(POLL)
            try:
                if (self.read("lease.json") or {}).get("id") == mine["id"]:
                    self.remove("lease.json")
            except UserError as error:
                warnings.warn(str(error))

    def _take(self, mine: dict) -> bool:
        """Whether there was no lease, and this one is there now."""
        with self._told("written"):
            system, path = self._at
            self._make_parent("lease.json")
            try:
                system.pipe_file(f"{path}/lease.json", json.dumps(mine).encode(), mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError) as error:
                raise UserError(
                    f"{self.url}: this file system cannot create a file only where there is none, so two "
                    "machines could not share a root there. Choose another one, or a folder."
                ) from error
        return (self.read("lease.json") or {}).get("id") == mine["id"]

    def _renew(self, mine: dict, ended: threading.Event) -> None:
        while not ended.wait(RENEWED):
            try:
                there = self.read("lease.json")
                if there and there["id"] != mine["id"]:  # this machine was asleep, or without a network
                    self.lost = True
                    console.print(f"{self.url} is being worked on by {there['host']} now; this process ends.")
                    return requests.ask()
                mine["beat"] += 1
                self.write("lease.json", mine)
            except UserError as error:
                warnings.warn(str(error))


RENEWED, EXPIRES, POLL, SETTLES = 20, 180, 3, 2  # seconds


def step_of(name: str) -> int:
    """Of checkpoints/step-00000003.json, 3."""
    return int(Path(name).name.partition("-")[2].partition(".")[0])
