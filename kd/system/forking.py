"""Processes that a server forks, as children of the process that requests them. Linux only.

The server forks twice, and the process between ends at once. The kernel then gives the child to the nearest ancestor
that adopts orphans. So the server has to be a descendant of that ancestor.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

REQUEST_BYTES = 1 << 20  # upper limit
MAX_FILES = 16  # per request
PR_SET_CHILD_SUBREAPER = 36


def request_child(server: socket.socket, request: bytes, files: list[int]) -> int:
    """Have a server fork a child of this process, and return its process id.

    Raises OSError or ValueError if the server has ended.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(server, [request], files)
        return int(server.recv(32))
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def fork_children(client: socket.socket) -> tuple[bytes, list[int]]:
    """Fork a child for each request; return only in the children, with the request and its files.

    The server itself ends when the other end of the socket is closed.
    """
    while True:
        request, files, _, _ = socket.recv_fds(client, REQUEST_BYTES, MAX_FILES)
        if not request:
            os._exit(0)
        between = os.fork()
        if between == 0 and _fork_again(client):
            return request, files
        for file in files:
            os.close(file)
        os.waitpid(between, 0)


def _fork_again(client: socket.socket) -> bool:
    """End this process, and continue as its child, once that has its new parent and the client has its process id."""
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    with suppress(OSError), client:  # a new parent that has ended is noticed later
        client.send(str(os.getpid()).encode())
    return True


def exit_after(work: Callable[[], None]) -> NoReturn:
    """Do the work of a child, and end it as Python does, but without freeing all modules, which takes 1.1 s.

    An error is raised, so that Python prints its traceback and ends the process itself.
    """
    try:
        work()
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def show_words(words: list[str]) -> None:
    """Make `ps` show these words in place of the server's, as far as there is room."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(field) for field in fields[45:47])  # arg_start and arg_end of proc(5)
    text = "\0".join(words).encode()[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
