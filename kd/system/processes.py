"""Processes of this machine: who is alive, who was killed for memory, and how much memory was used."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path


def process_info() -> dict:
    """This process, so that another one can tell whether it is still there."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot_id()}


def boot_id() -> str | None:
    """Of this start of this machine: a process id means nothing after the next one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def killed_for_memory() -> int:
    """How many processes the kernel has killed so far for want of memory; 0 where it does not say."""
    path = Path("/proc/vmstat")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def is_alive(process: dict) -> bool:
    """Whether a process of whereabouts() is there still; one on another machine is taken to be."""
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
    return True


def is_same_process(a: dict, b: dict) -> bool:
    """Return True for two reports of whereabouts() by one process."""
    return all(a.get(key) == b.get(key) for key in ("pid", "host", "boot"))


def peak_memory() -> int:
    """Most memory this process has held, bytes: on the GPU if there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
