"""Lease of a folder under a URL: only one machine works there at a time."""

from __future__ import annotations

import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kd.errors import UserError
from kd.system import retries
from kd.system.console import console
from kd.system.remote import Remote
from kd.system.signals import requests

LEASE = "lease.json"
EXPIRES, POLL, SETTLES = 180, 3, 2  # seconds


@contextmanager
def lease(remote: Remote, me: dict, alive: Callable[[dict], bool], patient: bool) -> Iterator[None]:
    """Hold lease.json under a URL. The lease is free again if it was not renewed for EXPIRES seconds.

    me: this process, as alive() takes it. patient: wait for another process, instead of raising UserError.
    """
    held = Lease(remote, me)
    held.acquire(alive, patient)
    ended = threading.Event()
    thread = threading.Thread(target=held.renew, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(POLL)
        held.release()


class Lease:
    """Lease of one process."""

    def __init__(self, remote: Remote, me: dict):
        self.remote, self.mine = remote, me | {"id": uuid.uuid4().hex, "beat": 0}
        self.seen: tuple[dict, float] | None = None  # lease of another process, and when that was last renewed
        self.was_renewed = False  # while this process waited

    def acquire(self, alive: Callable[[dict], bool], patient: bool) -> None:
        """Return when this process holds the lease; see lease()."""
        announced = False
        while not self._create():
            asked_at = time.monotonic()
            other = self.remote.read(LEASE)
            if other is None:
                continue
            if other["id"] == self.mine["id"]:  # the file was written, but the answer was lost
                return
            seen_at = self._watch(other, asked_at)
            is_local = all(other[name] == self.mine[name] for name in ("host", "boot"))
            if (is_local and not alive(other)) or time.monotonic() - seen_at > EXPIRES:
                if self._take_over():
                    return
                continue
            used = f"is being worked on by process {other['pid']} on {other['host']}"
            if not patient and (is_local or self.was_renewed):
                hint = "wait for that process to end: the same command then shows the run's result"
                raise UserError(option=self.remote.url, why=used, hint=hint)
            if not announced:
                until = "waiting for it" if patient else f"it is taken over if that says nothing for {EXPIRES} seconds"
                console.print(f"{self.remote.url} {used}; {until}.", soft_wrap=True)
            announced = True
            time.sleep(POLL)

    def _create(self) -> bool:
        """Write the lease unless one exists; return True if it was written."""
        return self.remote.create(LEASE, self.mine) and self._is_mine()

    def _is_mine(self, wait: float | None = None) -> bool:
        return (self.remote.read(LEASE, wait) or {}).get("id") == self.mine["id"]

    def _watch(self, other: dict, asked_at: float) -> float:
        """Note the lease of another process, read after `asked_at`; return the time of its last renewal."""
        now = time.monotonic()
        if self.seen is None or other != self.seen[0]:
            self.was_renewed = self.seen is not None
            self.seen = other, now
        elif now - asked_at > retries.RENEWED:  # the URL was away, for who holds the lease too
            self.seen = other, now
        return self.seen[1]

    def _take_over(self) -> bool:
        """Write this lease over another one. If several processes do so, the last writer has it."""
        self.remote.write(LEASE, self.mine)
        time.sleep(SETTLES)
        return self._is_mine()

    def renew(self, ended: threading.Event) -> None:
        """Renew the lease until `ended`. If another process has taken it over, request this process to end."""
        while not ended.wait(retries.RENEWED):
            try:
                other = self.remote.read(LEASE, 0)
                if other and other["id"] != self.mine["id"]:  # this machine was asleep, or without a network
                    self.remote.lost = True
                    console.print(f"{self.remote.url} is being worked on by {other['host']} now; this process ends.")
                    return requests.ask()
                self.mine["beat"] += 1
                self.remote.write(LEASE, self.mine, 0)
            except UserError as error:
                warnings.warn(str(error))

    def release(self) -> None:
        """Remove the lease if this process still holds it; a failure is a warning."""
        try:
            if self._is_mine(retries.SOON):
                self.remote.remove(LEASE, wait=retries.SOON)
        except UserError as error:
            warnings.warn(str(error))
