"""Properties of the machine that a training step depends on: memory, and the speed of bfloat16."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import torch
from torch import nn


def disable_malloc_trim() -> None:
    """Make this process keep freed memory for its next allocations.

    By default, glibc maps tensors above 32 MiB again each time and returns large ones at once. The kernel then clears
    every page of them on first touch, which can take longer than the arithmetic. Does nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def cast_parameters(dtype: torch.dtype, model: nn.Module) -> None:
    """Keep the parameters of a frozen model in `dtype`, and compute in it, residual stream included.

    Buffers keep their precision: rotary frequencies in bfloat16 would be off by whole turns at far positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def slowdown_in_bf16(device: torch.device) -> float:
    """Return the measured time of a training step's matrix product in bfloat16, as a multiple of that in float32.

    The value is below 1 if the processor computes in bfloat16. If a CPU does not, the product with an output layer that
    is not transposed, as in every backward pass, can take a hundred times as long.
    """
    if device.type != "cpu":
        return 0.5
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        gradient, weight = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 128, dtype=dtype)
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            gradient @ weight
            rounds.append(time.perf_counter() - start)
        seconds.append(min(rounds))
    return seconds[1] / seconds[0]


def capacity(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_utilisation(device: torch.device) -> float | None:
    """Return the share of the last moments in which a GPU computed, from 0 to 1.

    None for a CPU, and where NVML or its package nvidia-ml-py is missing.
    """
    try:
        return torch.cuda.utilization(device) / 100 if device.type == "cuda" else None
    except Exception:  # of that package, which has types of its own, e.g. for a part of a GPU
        return None


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that memory ran out. torch has a type for it on GPUs alone."""
    words = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "bad allocation",
             "cublas_status_alloc_failed", "could not create a primitive", "can't start new thread")  # fmt: skip
    is_memory_error = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_memory_error or (
        isinstance(error, RuntimeError | OSError) and any(w in str(error).lower() for w in words)
    )
