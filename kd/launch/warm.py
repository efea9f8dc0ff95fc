"""Runs of a sweep that start with everything imported, forked from a server process that has done the imports.

Importing torch, Lightning and transformers takes longer than a short run trains. The server does that once, and nothing
else: it has no threads of torch, and has used no GPU. It forks twice for each run, and the process between ends at
once. So the run becomes a child of the sweep, with its own exit status, memory and signals. It also outlives the
server. Linux only.

The server has exactly the environment and the code of its runs. With another environment, or after an edit of the code,
there is another server.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kd.config import plugins
from kd.config.components import PACKAGE
from kd.system.forking import fork_children, request_child, show_words

WORD = "--warm"  # how train.py is told that it is a server: --warm FILE_DESCRIPTOR
# What a run loads beside what train.py does: training, with torch and Lightning, and what these load when they first
# need it.
MODULES = ("kd.experiment.fit", "kd.models.optimizers", "safetensors.torch", "transformers.models.llama.modeling_llama")
ROOM = 4096  # bytes for the words of a run, as ps shows them
PATIENCE = 60  # seconds for a fork, however busy the machine is
READY = b"ready"


@dataclass
class Forked:
    """Forked run, with the part of subprocess.Popen's interface that pools use."""

    pid: int
    returncode: int | None = None


class Warm:
    """Server in the view of the sweep. It starts when it is first needed, and ends when the sweep does."""

    def __init__(self, program: str):
        self.program = program
        self.failed = ""  # exit of a server by itself; no other is started then
        self.server: subprocess.Popen | None = None
        self.socket: socket.socket | None = None
        self.is_ready = False
        self.made_for: tuple[dict[str, str], dict[str, tuple[int, int]]] | None = None

    def ready(self, environment: dict[str, str], log: Path) -> bool:
        """Return True if a run can be started without waiting.

        Starts a server if there is none; its output goes to `log`.
        """
        wanted = environment, self._sources()
        if self.failed:
            return True
        if self.made_for != wanted:
            self.close()
            self._start(environment, log)
            self.made_for = wanted
        if not self.is_ready and self.socket and select.select([self.socket], [], [], 0)[0]:
            self.is_ready = self.socket.recv(len(READY)) == READY
            if not self.is_ready:
                self._fail(f", as {log} says")
        return bool(self.is_ready or self.failed)

    def fork(self, words: list[str], log: int) -> Forked | None:
        """Start a run that writes to an open file, as a child of this process; return None if that is not possible."""
        if not self.is_ready or self.socket is None:
            return None
        try:
            pid = request_child(self.socket, json.dumps(words).encode(), [log])
        except (OSError, ValueError):  # the server is gone
            self._fail()
            return None
        return Forked(pid)

    def close(self) -> int | None:
        """End the server, but none of its runs, and return its exit code."""
        code = None
        if self.socket:
            self.socket.close()
        if self.server:
            self.server.kill()  # it may not listen; one that has ended keeps its exit code
            code = self.server.wait()
        self.server = self.socket = self.made_for = None
        self.is_ready = False
        return code

    def _fail(self, context: str = "") -> None:
        code = self.close()
        self.failed = f"The process that runs are forked from has ended with exit code {code}{context}"

    def _start(self, environment: dict[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        self.socket = ours
        command = [sys.executable, self.program, WORD, str(theirs.fileno()), " " * ROOM]
        with theirs, open(log, "ab") as file:
            self.server = subprocess.Popen(
                command, env=environment, start_new_session=True, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _sources(self) -> dict[str, tuple[int, int]]:
        """Return modification time and size of each file of kd and of the plug-ins."""
        stamps = {}
        others = [path for plugin in plugins.allowed().values() for path in plugin.modules.values()]
        for path in (Path(self.program), *PACKAGE.rglob("*.py"), *others):
            with suppress(FileNotFoundError):  # of an editor, for a moment
                stat = path.stat()
                stamps[str(path)] = stat.st_mtime_ns, stat.st_size
        return stamps


def serve(number: str) -> list[str]:
    """Fork a run for each request on a socket, until it is closed; return in each run, with its words."""
    for name in MODULES:
        importlib.import_module(name)
    if threading.active_count() > 1:
        sys.exit("A library has started a thread while it was imported, so that this process cannot be forked.")
    sweep = socket.socket(fileno=int(number))
    _write_to(os.open(os.devnull, os.O_WRONLY))  # earlier output is in the log of the first run
    gc.collect()
    gc.freeze()  # what is there is left alone by every run, so that its pages stay shared
    sweep.send(READY)
    request, (log,) = fork_children(sweep)
    os.setsid()  # the sweep passes on a terminal's signal, once
    _write_to(log)
    words = json.loads(request)
    sys.argv[1:], sys.orig_argv[1:] = words, [sys.argv[0], *words]
    show_words([sys.executable, *sys.orig_argv[1:]])
    return words


def _write_to(file: int) -> None:
    """Send all output to an open file."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
