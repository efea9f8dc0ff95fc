"""A file system of fsspec behind a network that is gone for a time."""

import time

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Away(LocalFileSystem):
    """A folder behind a network that is gone until a time."""

    protocol = "away"
    until = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("away://"))

    @classmethod
    def go(cls, seconds: float) -> None:
        cls.until = time.monotonic() + seconds


def _fails_while_away(name: str):
    def method(self, *args, **kwargs):
        if time.monotonic() < Away.until:
            raise OSError("the network is gone")
        return getattr(LocalFileSystem, name)(self, *args, **kwargs)

    return method


for name in ("cat_file", "get_file", "put_file", "pipe_file", "find", "exists", "rm", "makedirs"):
    setattr(Away, name, _fails_while_away(name))
fsspec.register_implementation("away", Away, clobber=True)
