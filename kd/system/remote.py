"""A root under an fsspec URL: what is worked on is a folder of this machine, and what counts is there.

Nothing is renamed there, as object stores cannot: a checkpoint is objects of names of its own, and then a note with
their digests, without which they are not a checkpoint; a run is done by its result.json, written last.

A URL that does not answer is tried again (patiently()): for minutes by default, for less where a process is to end,
and not at all where something else can be done meanwhile.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from kd.errors import UserError
from kd.system import files
from kd.system.console import clock, console
from kd.system.signals import requests

T = TypeVar("T")
# These have no folders to be made, and some of their clients would make a bucket.
OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}
ASK_AGAIN = 5  # seconds: what was not there is not asked for sooner


PATIENCE = 600  # seconds that a URL may not answer, where the work cannot go on without
SOON = 30  # the same where a process is to end, and what could not be copied is on this machine
PAUSES = (1, 15)  # seconds between two tries: the first time, and at most
# Errors that time does not mend, by type and by number.
LASTING = (ImportError, FileNotFoundError, PermissionError, FileExistsError, NotImplementedError, TypeError, ValueError)
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)


class Unreachable(UserError):
    """A URL does not answer, and may do so later."""


class Damaged(UserError):
    """A file under a URL is not what was written."""


@dataclass
class Outage:
    """The time in which no try to reach a bucket or server succeeded."""

    since: float
    last: float
    said: bool = False


_outages: dict[str, Outage] = {}


def bucket(url: str) -> str:
    """The part of a URL that is away as a whole: s3://bucket."""
    return "/".join(url.split("/", 3)[:3])


def is_away(url: str) -> bool:
    """Whether the bucket or server did not answer when it was last tried, moments ago."""
    outage = _outages.get(bucket(url))
    return outage is not None and time.monotonic() - outage.last < PAUSES[1]


def patiently(url: str, what: str, act: Callable[[], T], wait: float | None = None) -> T:
    """Return act(), tried again while the URL does not answer, until it has been away for `wait` seconds (PATIENCE).

    what: "read" or "written", for the UserError that is raised in the end: Unreachable where time may mend it.
    """
    wait, pause = PATIENCE if wait is None else wait, PAUSES[0]
    since, said = math.inf, False
    if wait == 0 and is_away(url):
        raise Unreachable(option=url, why=f"could not be {what}: {bucket(url)} does not answer")
    while True:
        try:
            value = act()
        except UserError:
            raise
        except Exception as error:
            failed = explained(url, what, error)
            if not isinstance(failed, Unreachable):
                raise failed from error
            now, outage = time.monotonic(), _outages.get(bucket(url))
            if outage is None or now - outage.last > 2 * max(RENEWED, PAUSES[1]):  # nobody has asked for a while
                outage = _outages[bucket(url)] = Outage(now, now)
            outage.last = now
            since = min(since, outage.since)  # also where other things are reached in between
            left = wait - (now - since)
            if left < pause:
                raise failed from error
            if not said and not outage.said:
                console.print(f"{failed} It is tried again for {clock(left)}.", soft_wrap=True)
                said = outage.said = True
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
        else:
            _outages.pop(bucket(url), None)
            if said:
                away = clock(time.monotonic() - since)
                console.print(f"{bucket(url)} answers again, after {away}.", soft_wrap=True)
            return value


def explained(url: str, what: str, error: Exception) -> UserError:
    """The error of a file system, each of which has errors of its own, for people."""
    failed = f"could not be {what}"
    if isinstance(error, ImportError):  # fsspec names the package in it
        hint = "install the package that this error names with pip install"
        return UserError(option=url, why=f"{failed}: {error}", hint=hint)
    if isinstance(error, FileNotFoundError):
        return UserError(option=url, why=f"{failed}: {error}", hint="check that its bucket or server exists")
    if isinstance(error, PermissionError) or re.search("Credential|Authentication", type(error).__name__):
        hint = "give the credentials that the package for this kind of URL reads, e.g. in the environment"
        return UserError(option=url, why=f"{failed}: no access ({error})", hint=hint)
    lasts = isinstance(error, LASTING) or getattr(error, "errno", None) in NUMBERS
    return (UserError if lasts else Unreachable)(option=url, why=f"{failed} ({type(error).__name__}: {error})")


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
    """A folder under a URL, and its copy on this machine. All methods raise UserError where the URL fails.

    wait: for how many seconds a URL that does not answer is tried again, None for PATIENCE.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url.rstrip("/"), folder
        self.lost = False  # whether another machine works on it now
        self._seen: dict[str, tuple[float, int, dict | None]] = {}  # read at, time of the local state, content
        self._thread: ThreadPoolExecutor | None = None
        self._sending: Future | None = None
        self._system: tuple[Any, str] | None = None  # file system of fsspec, and the path in it

    def _tried(self, what: str, act: Callable[..., T], wait: float | None) -> T:
        """Return act(system, path), with a connection of its own at each try."""

        def act_there() -> T:
            import fsspec  # takes its time, which a folder has no use for

            try:
                system, path = self._system = self._system or fsspec.core.url_to_fs(self.url)
                return act(system, path.rstrip("/"))
            except Exception as error:
                if self._system and isinstance(explained(self.url, what, error), Unreachable):
                    type(self._system[0]).clear_instance_cache()
                    self._system = None
                raise

        return patiently(self.url, what, act_there, wait)

    def read(self, name: str, wait: float | None = None) -> dict | None:
        """A JSON file there, or None if there is none."""

        def act(system, path: str) -> dict | None:
            try:
                return json.loads(system.cat_file(f"{path}/{name}"))
            except FileNotFoundError:
                return None
            except ValueError as error:
                why, hint = f"is damaged ({error})", "remove this file to make it again"
                raise Damaged(option=f"{self.url}/{name}", why=why, hint=hint) from None

        return self._tried("read", act, wait)

    def now_and_then(self, name: str, wait: float | None = None) -> dict | None:
        """The same for who asks all the time: anew after some seconds, or when this machine wrote of the run."""
        local = self.folder / "state.json"
        written = local.stat().st_mtime_ns if local.exists() else 0
        seen = self._seen.get(name)
        if seen is not None:
            read_at, state, content = seen
            done = content and name == "result.json"  # which never changes
            if done or (state == written and time.monotonic() - read_at <= ASK_AGAIN):
                return content
        content = self.read(name, wait)
        self._seen[name] = (time.monotonic(), written, content)
        return content

    def forget(self) -> None:
        """Ask anew, whatever was there a moment ago."""
        self._seen.clear()

    def get(self, name: str, wait: float | None = None, to: Path | None = None) -> bool:
        """Copy a file from there; whether there is one. Raises UserError for a name of a place outside.

        to: where to; by default the same name in the folder.
        """
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            why = f"has a note that names a file outside of it, {name}; nothing was copied there"
            raise UserError(option=self.url, why=why, hint="remove that note if it is not from kd")
        to = to or self.folder / name

        def act(system, path: str) -> bool:
            try:
                with files.atomic(to) as temporary:
                    system.get_file(f"{path}/{name}", str(temporary))
            except FileNotFoundError:
                to.unlink(missing_ok=True)
                return False
            return True

        return self._tried("read", act, wait)

    def names(self, name: str = "", wait: float | None = None) -> list[str]:
        """All files there below a folder, as they are named from the URL."""

        def act(system, path: str) -> list[str]:
            system.invalidate_cache()
            below = f"{path}/{name}".rstrip("/")
            found = system.find(below) if system.exists(below) else []
            return sorted(str(x).removeprefix(path).lstrip("/") for x in found)

        return self._tried("read", act, wait)

    def put(self, *names: str, wait: float | None = None) -> None:
        """Copy files, and all files of folders, there; what does not exist is left out."""
        for name in names:
            found = self.folder / name
            for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
                inner = file.relative_to(self.folder)
                passing = any(part.endswith((".tmp", ".lock")) for part in inner.parts)
                if file.is_file() and not file.is_symlink() and not passing:
                    self._put(file, inner.as_posix(), wait)

    def _put(self, file: Path, name: str, wait: float | None) -> None:
        def act(system, path: str) -> None:
            _make_parent(system, f"{path}/{name}")
            system.put_file(str(file), f"{path}/{name}")

        self._tried("written", act, wait)

    def write(self, name: str, value: dict, wait: float | None = None) -> None:
        """value as a JSON file there."""

        def act(system, path: str) -> None:
            _make_parent(system, f"{path}/{name}")
            system.pipe_file(f"{path}/{name}", (json.dumps(value, indent=1) + "\n").encode())

        self._tried("written", act, wait)

    def remove(self, *names: str, wait: float | None = None) -> None:
        def act(system, path: str) -> None:
            for name in names:
                if system.exists(f"{path}/{name}"):
                    system.rm(f"{path}/{name}", recursive=True)

        self._tried("written", act, wait)

    def tell(self, *names: str) -> None:
        """put() of what can wait: a failure is said and not raised."""
        try:
            if not self.lost:
                self.put(*names, wait=SOON)
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
                note = self.read(name) or {}
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
                option=self.url,
                why=f"every checkpoint of this run is damaged: {', '.join(notes)}",
                hint=f"remove {self.url}/checkpoints to train it anew",
            )
        return False

    def _pull(self, name: str, digest: str) -> bool:
        """Copy a file; whether it is what was written."""
        return self.get(name) and files.digest(self.folder / name) == digest

    def send_checkpoint(
        self, path: Path, first: Callable[[float], None] | None, writing: Future | None, wait: float = 0
    ) -> None:
        """Copy a checkpoint there, beside the training; what is on its way is waited for before.

        first: what has to be there before it, as a function of `wait`. writing: what gives the checkpoint its name, if
        it has none yet. Training does not wait for a URL that is away: the next checkpoint makes up for this one.
        """
        self.finish_sending()
        self._thread = self._thread or ThreadPoolExecutor(1, "remote")
        self._sending = self._thread.submit(self._send, path, first, writing, wait)

    def finish_sending(self) -> None:
        """Wait for the checkpoint on its way; warns if it did not arrive."""
        sending, self._sending = self._sending, None
        if sending is None:
            return
        try:
            sending.result()
        except UserError as error:
            warnings.warn(f"{error}\nThat checkpoint is here alone; the next one is copied again.")

    def _send(self, path: Path, first: Callable[[float], None] | None, writing: Future | None, wait: float) -> None:
        if writing:
            futures.wait([writing])  # what goes wrong with it is said where it was asked for
        if self.lost or not path.exists():
            return
        if first:
            first(wait)
        step, name = step_of(path.name), f"checkpoints/{path.stem}"
        whole = [x for x in (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True) if x.endswith("\n")]
        metrics = self.folder / f"{name}.jsonl"
        with files.atomic(metrics) as temporary:  # of the steps that are not run again
            temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        written = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        parts = [p.relative_to(self.folder).as_posix() for p in (*written, metrics)]
        digests = {p: files.digest(self.folder / p) for p in parts}
        self.put(*parts, "metrics.jsonl", "state.json", wait=wait)
        metrics.unlink()
        self.write(f"{name}.json", {"files": digests, "digest": path.with_suffix(".xxh3").read_text()}, wait)
        there = self.names("checkpoints", wait)
        for note in sorted((x for x in there if x.endswith(".json") and step_of(x) <= step), reverse=True)[2:]:
            self.remove(note, wait=wait)  # first, so that no note is without its files
        stems = {x.partition(".")[0] for x in self.names("checkpoints", wait) if x.endswith(".json")}
        self.remove(*(x for x in there if x.partition(".")[0] not in stems and not x.endswith(".json")), wait=wait)

    # Who works on it

    @contextmanager
    def lease(self, me: dict, alive: Callable[[dict], bool], patient: bool) -> Iterator[None]:
        """Only one machine works on it: who holds lease.json, until it was not renewed for EXPIRES seconds.

        me: this process, as alive() takes it. patient: wait for another one, instead of raising UserError.
        """
        mine, said, seen, renewed = me | {"id": uuid.uuid4().hex, "beat": 0}, False, None, False
        while not self._take(mine):
            asked = time.monotonic()
            there = self.read("lease.json")
            if there is None:
                continue
            if there["id"] == mine["id"]:  # it was written, and the answer was lost
                break
            if seen is None or there != seen[0]:
                renewed = seen is not None
                seen = there, time.monotonic()
            elif time.monotonic() - asked > RENEWED:  # the URL was away, for who holds the lease too
                seen = there, time.monotonic()
            here = (there["host"], there["boot"]) == (me["host"], me["boot"])
            if (here and not alive(there)) or time.monotonic() - seen[1] > EXPIRES:
                self.write("lease.json", mine)
                time.sleep(SETTLES)  # of several who find it free, the last to write has it
                if (self.read("lease.json") or {}).get("id") == mine["id"]:
                    break
                continue
            used = f"is being worked on by process {there['pid']} on {there['host']}"
            if not patient and (here or renewed):
                hint = "wait for that process to end: the same command then shows the run's result"
                raise UserError(option=self.url, why=used, hint=hint)
            if not said:
                until = "waiting for it" if patient else f"it is taken over if that says nothing for {EXPIRES} seconds"
                console.print(f"{self.url} {used}; {until}.", soft_wrap=True)
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
                if (self.read("lease.json", SOON) or {}).get("id") == mine["id"]:
                    self.remove("lease.json", wait=SOON)
            except UserError as error:
                warnings.warn(str(error))

    def _take(self, mine: dict) -> bool:
        """Whether there was no lease, and this one is there now."""
        return self.create("lease.json", mine) and (self.read("lease.json") or {}).get("id") == mine["id"]

    def create(self, name: str, value: dict, wait: float | None = None) -> bool:
        """Write a JSON file there unless there is one; whether there was none."""

        def act(system, path: str) -> bool:
            _make_parent(system, f"{path}/{name}")
            try:
                system.pipe_file(f"{path}/{name}", json.dumps(value).encode(), mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError) as error:
                raise UserError(
                    option=self.url,
                    why="this file system cannot create a file only if it does not exist, so that two machines could "
                    "not share a root there",
                    hint="choose a URL of another file system, or a folder",
                ) from error
            return True

        return self._tried("written", act, wait)

    def _renew(self, mine: dict, ended: threading.Event) -> None:
        while not ended.wait(RENEWED):
            try:
                there = self.read("lease.json", 0)
                if there and there["id"] != mine["id"]:  # this machine was asleep, or without a network
                    self.lost = True
                    console.print(f"{self.url} is being worked on by {there['host']} now; this process ends.")
                    return requests.ask()
                mine["beat"] += 1
                self.write("lease.json", mine, 0)
            except UserError as error:
                warnings.warn(str(error))


RENEWED, EXPIRES, POLL, SETTLES = 20, 180, 3, 2  # seconds


def _make_parent(system, path: str) -> None:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if not OBJECTS & protocols:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)


def step_of(name: str) -> int:
    """Of checkpoints/step-00000003.json, 3."""
    return int(Path(name).name.partition("-")[2].partition(".")[0])
