"""Processes of this machine: which are alive, which were killed for memory, and how much memory was used."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import resource


_pid: int | None = None  # process that this one stands for


def stand_for(pid: int) -> None:
    """Describe another process of this machine as this one: the process of a run, for one of its ranks."""
    global _pid
    _pid = pid


def process_info() -> dict:
    """Return a description of this process, from which another process can tell if it is alive."""
    return {"pid": _pid or os.getpid(), "host": socket.gethostname(), "boot": boot_id()}


def boot_id() -> str | None:
    """Return the id of the current boot of this machine. A process id means nothing after the next boot."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def killed_for_memory() -> int:
    """Return the number of processes that the kernel has killed for lack of memory; 0 if it does not report any."""
    path = Path("/proc/vmstat")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def is_alive(process: dict) -> bool:
    """Return True if the process of a process_info() is alive. A process of another machine counts as alive."""
    if process["host"] != socket.gethostname():
        return True
    if process["boot"] != boot_id():
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not _is_zombie(process["pid"])


def _is_zombie(pid: int) -> bool:
    """Return True for a process that has ended and that its parent has not asked about yet, where /proc shows it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"


def is_same_process(a: dict, b: dict) -> bool:
    """Return True if two results of process_info() are of one process."""
    return all(a.get(key) == b.get(key) for key in ("pid", "host", "boot"))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: on the GPU if there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return most_resident(resource.getrusage(resource.RUSAGE_SELF))


def memory() -> int | None:
    """Return the memory of this process in bytes: on the GPU if there is one, else resident.

    None where the system does not tell it.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


def most_resident(usage: resource.struct_rusage) -> int:
    """Return the peak of resident memory of a resource usage, in bytes."""
    return usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
