"""Retries for a URL that may not answer: for minutes by default, for less time if a process has to end.

There are no retries if other work can be done meanwhile.
"""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kd.errors import UserError
from kd.system.console import console, format_duration

T = TypeVar("T")
RENEWED = 20  # seconds between two renewals of a lease (kd/system/lease.py)
PATIENCE = 600  # seconds without an answer, for work that needs the URL
SOON = 30  # the same where a process is to end, and what could not be copied is on this machine
PAUSES = (1, 15)  # seconds between two tries: the first time, and at most
# Errors that are permanent, by type and by number.
LASTING = (ImportError, FileNotFoundError, PermissionError, FileExistsError, NotImplementedError, TypeError, ValueError)
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)


class Unreachable(UserError):
    """Error of a URL that does not answer, but may do so later."""


@dataclass
class Outage:
    """Time without a successful try to reach a bucket or server."""

    since: float
    last: float
    announced: bool = False


_outages: dict[str, Outage] = {}


def bucket(url: str) -> str:
    """Return the part of a URL that fails as a whole: s3://bucket."""
    return "/".join(url.split("/", 3)[:3])


def is_away(url: str) -> bool:
    """Return True if the bucket or server did not answer the last try, moments ago."""
    outage = _outages.get(bucket(url))
    return outage is not None and time.monotonic() - outage.last < PAUSES[1]


def patiently(url: str, what: str, act: Callable[[], T], wait: float | None = None) -> T:
    """Return act(), tried again until the URL answers or has been away for `wait` seconds (default: PATIENCE).

    what: "read" or "written", for the UserError at the end. The error is Unreachable if the URL may answer later.
    """
    wait, pause = PATIENCE if wait is None else wait, PAUSES[0]
    since, announced = math.inf, False
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
            if outage is None or now - outage.last > 2 * max(RENEWED, PAUSES[1]):  # the last try was some time ago
                outage = _outages[bucket(url)] = Outage(now, now)
            outage.last = now
            since = min(since, outage.since)  # also where other things are reached in between
            remaining = wait - (now - since)
            if remaining < pause:
                raise failed from error
            if not announced and not outage.announced:
                console.print(f"{failed} It is tried again for {format_duration(remaining)}.", soft_wrap=True)
                announced = outage.announced = True
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
        else:
            _outages.pop(bucket(url), None)
            if announced:
                away = format_duration(time.monotonic() - since)
                console.print(f"{bucket(url)} answers again, after {away}.", soft_wrap=True)
            return value


def explained(url: str, what: str, error: Exception) -> UserError:
    """Return an error of a file system as an error for people. Each file system has its own errors."""
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
