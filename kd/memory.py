"""Memory that a step need not ask for again: pages of freed tensors, and half-precision copies of a frozen model."""

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


def hold_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of a frozen model's linear layers in the precision that autocast would cast them to anyway.

    What comes out is the same, without a cast per step. A tied embedding keeps its own precision, and so does all else.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, weight in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(weight.to(dtype), requires_grad=False))
