"""kd: sweep the design space of knowledge distillation for language models."""

__version__ = "0.1.0"
