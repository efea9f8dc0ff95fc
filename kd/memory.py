"""Memory that a step need not ask for again: pages of freed tensors, and half of a frozen model."""

from __future__ import annotations

import ctypes
import platform

import torch
from torch import nn


def keep_freed() -> None:
    """Have this process keep the memory that it frees, for what it allocates next.

    glibc maps tensors above 32 MiB anew each time and gives large ones back at once, and the kernel clears every page
    of them again on first touch, which can take longer than the arithmetic. Does nothing where there is no glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def hold_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Keep the parameters of a frozen model in `dtype`, and compute in it, residual stream included.

    Buffers keep their precision: rotary frequencies in bfloat16 would be off by whole turns at far positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
