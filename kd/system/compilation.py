"""torch.compile where it is optional, and the folder of compiled code."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import torch
import torch._dynamo
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from kd.errors import first_line
from kd.system import files
from kd.system.console import console

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable of torch; kernels of Triton are below this folder

# Shapes and kinds of arguments that a function is compiled for, at most. A run with plain text, prompts and token
# selection can exceed 8, the default of torch, which would compute the rest without compiled code and not say so.
torch._dynamo.config.recompile_limit = 64

_failed = False  # in this process; the warning is printed once


def compile_if_possible(function: Callable) -> Callable:
    """Return a compiled function that computes as the function itself if compiling fails, with one warning."""
    compiled = torch.compile(function)

    def call(*arguments, **named):
        global _failed
        if not _failed:
            try:
                return compiled(*arguments, **named)
            except TorchDynamoException as error:
                _failed = True
                console.print(
                    "torch.compile failed, so this run is slower and takes more memory than it could: "
                    f"{first_line(error)}\n"
                    "trainer.compile=false leaves it out; trainer.compile=true shows all of the error.",
                    soft_wrap=True,
                )  # fmt: skip
        return function(*arguments, **named)

    return call


def keep_compiled_code() -> None:
    """Keep compiled code in $KD_CACHE for later runs of this person, unless the environment names another folder.

    It is not kept in a root: roots are copied from others, and compiled code is executed as it is.
    """
    folder = (files.cache() / "compiled").absolute()
    if os.environ.get(CACHE, default_cache_dir()) != default_cache_dir():  # torch itself sets its default when loaded
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[CACHE] = str(folder)
