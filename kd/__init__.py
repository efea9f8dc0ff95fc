"""kd: sweep the design space of knowledge distillation for language models."""

import os

from kd.launchers import forget_ranks

__version__ = "0.1.0"

forget_ranks(os.environ)  # before any library that reads them is loaded
