"""kd: sweep the design space of knowledge distillation for language models.

In a notebook or a trainer of your own; each name is loaded when it is first used, so that `import kd` is cheap:

    kd.distillation_loss(student_logits, teacher_logits, labels, loss=kd.losses.akl)   loss of logits, to train by
    kd.losses, kd.truncation, kd.targets, kd.temperature     the functions that it takes
    kd.Target, kd.Objective                                  what a loss of your own reads; the loss in chunks
    kd.load_results("runs", sweep="loss")                    a record per run, for pandas.DataFrame
    kd.load_student("runs/RUN")                              model and tokenizer of transformers
    kd.UserError                                             raised for what the caller can mend
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.api.losses import distillation_loss
    from kd.api.results import load_results
    from kd.api.students import load_student
    from kd.errors import UserError
    from kd.objective import losses, temperature, truncation
    from kd.objective import target_transforms as targets
    from kd.objective.chunked import Objective
    from kd.objective.target import Target

__version__ = "0.1.0"
__all__ = [
    "Objective", "Target", "UserError", "distillation_loss", "load_results", "load_student", "losses", "targets",
    "temperature", "truncation",
]  # fmt: skip

# Name -> module, or module:attribute.
_PLACES = {
    "distillation_loss": "kd.api.losses:distillation_loss",
    "load_results": "kd.api.results:load_results",
    "load_student": "kd.api.students:load_student",
    "UserError": "kd.errors:UserError",
    "Objective": "kd.objective.chunked:Objective",
    "Target": "kd.objective.target:Target",
    "losses": "kd.objective.losses",
    "targets": "kd.objective.target_transforms",
    "temperature": "kd.objective.temperature",
    "truncation": "kd.objective.truncation",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'kd' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    imported = import_module(module)
    value = getattr(imported, attribute) if attribute else imported
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
