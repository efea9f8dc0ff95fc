"""From the composed config to objects: only what an allowlist admits, with arguments of the right types."""

from __future__ import annotations

import ast
import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from kd.errors import UserError
from kd.sizes import SIZES

CONF = Path(__file__).parent.parent / "conf"
SWEEPS = Path(__file__).parent.parent / "sweeps"

# A `_target_` may name a public function defined in one of these modules, or one of these classes, and nothing else.
MODULES = ("losses", "truncation", "temperature", "schedules", "logits", "corpora", "loggers")
CLASSES = ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD")
# Arguments that would make a library run code it downloaded or unpickle what it reads.
FORBIDDEN = ("trust_remote_code", "allow_pickle", "weights_only", "use_safetensors")

Node = dict[str, typing.Any]


def check_targets(node, path: str = "") -> None:
    """Refuse any `_target_` outside the allowlist, anywhere in the tree, before anything is imported or run."""
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                locate(value, path)
            if key in FORBIDDEN:
                raise UserError(f"{where}={value}: not accepted from a config, since it can run foreign code.")
            check_targets(value, where)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_targets(value, f"{path}[{index}]")


def locate(target: str, path: str) -> tuple[str, str]:
    """Module and name of what `target` stands for; raises UserError unless the allowlist admits it. Imports nothing."""
    module, _, name = str(target).rpartition(".")
    if target in CLASSES or (module in {f"kd.{m}" for m in MODULES} and name in _functions(module)):
        return module, name
    raise UserError(
        f"{path}._target_={target}: not something a config may call. Allowed are the functions of "
        f"{', '.join(f'kd.{m}' for m in MODULES)}, and {', '.join(CLASSES)}."
    )


def load(target: str, path: str):
    """The function or class that `target` names, once more checked as an object."""
    module, name = locate(target, path)
    found = getattr(importlib.import_module(module), name)
    assert target in CLASSES or (inspect.isfunction(found) and found.__module__ == module)
    return found


@cache
def _functions(module: str) -> dict[str, str]:
    """Public functions that the source of a module of kd defines, with the first line of their docstrings."""
    source = ast.parse((Path(__file__).parent / f"{module.rpartition('.')[2]}.py").read_text())
    functions = [n for n in source.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    return {f.name: (ast.get_docstring(f) or "").partition("\n")[0] for f in functions}


def build(node: Node, path: str, **given):
    """The function that node names with the node's other keys as arguments; a `_partial_` node waits for the rest.

    `given` are arguments that do not come from the config. Raises UserError for a wrong target, name or type.
    """
    settings = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    function = load(node["_target_"], path)
    check_types(function, settings, path)
    call = partial(function, **settings, **given)
    return call if node.get("_partial_") else call()


def check_types(function, settings: Node, path: str) -> None:
    """The signature is the schema: raise UserError for a name it does not have or a value of another type."""
    parameters = inspect.signature(function).parameters
    module = inspect.getmodule(function)
    hints = typing.get_type_hints(function) if module and module.__name__.startswith("kd.") else {}
    for name, value in settings.items():
        if name not in parameters:
            known = ", ".join(n for n in parameters if n not in ("student", "target", "progress", "params"))
            raise UserError(f"{path}.{name}={value}: no such option here; there is {known or 'none'}.")
        hint = hints.get(name)
        if hint is not None and not _fits(value, hint):
            raise UserError(f"{path}.{name}={value}: need {_say(hint)}, got {type(value).__name__}.")


def _fits(value, hint) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        option = typing.get_origin(option) or option
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if option in (int, str, bool, dict, list) and type(value) is option:
            return True
        if option is type(None) and value is None:
            return True
        if option is str and isinstance(value, Path):
            return True
    return False


def _say(hint) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(words.get(option, str(option)) for option in options)


def checked(function, node: Node, path: str) -> Node:
    """The part of node that the function has parameters for, with their types checked."""
    settings = {k: v for k, v in node.items() if k in inspect.signature(function).parameters}
    check_types(function, settings, path)
    return settings


WHOLE = ("trainer.steps", "trainer.batch", "trainer.micro_batch", "trainer.chunk", "trainer.log_every",
         "trainer.val_every", "trainer.checkpoint_every", "teacher.steps", "teacher.batch")  # fmt: skip


def check_numbers(settings: Node) -> None:
    """Raise UserError for a setting of the trainer or the teacher that no run could have."""
    values = flat(settings)
    for option in WHOLE:
        if type(values[option]) is not int or values[option] < 1:
            raise UserError(f"{option}={values[option]}: need a whole number of at least 1.")
    for option in ("seed", "teacher.seed"):
        if type(values[option]) is not int or not 0 <= values[option] < 2**32:
            raise UserError(f"{option}={values[option]}: need a whole number from 0 to {2**32 - 1}.")
    for option in ("trainer.precision", "teacher.precision"):
        if values[option] not in ("fp32", "bf16"):
            raise UserError(f"{option}={values[option]}: need fp32 or bf16.")
    clip = values["trainer.clip"]
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not clip >= 0:
        raise UserError(f"trainer.clip={clip}: need a number of at least 0 (0 does not clip).")


def flat(node: Node, prefix: str = "") -> Node:
    """Nested keys joined with dots, `_target_` replaced by the name it ends in."""
    out: Node = {}
    for key, value in node.items():
        if key == "_partial_":
            continue
        if key == "_target_":
            out[prefix.rstrip(".")] = value.rpartition(".")[2]
        elif isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def register() -> None:
    """Tell Hydra what is not a file of conf/: a student and a teacher per row of kd/sizes.py, and the sweeps."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for size in SIZES:
        for group in ("student", "teacher"):
            store.store(group=group, name=size, node={"size": size, "name": None})
    for file in sorted(SWEEPS.glob("*.yaml")):
        sweep = OmegaConf.load(file)
        node = {"sweep": {"name": file.stem, **sweep}, "hydra": {"mode": "MULTIRUN"}}
        store.store(group="sweeps", name=file.stem, node=node, package="_global_")
    OmegaConf.register_new_resolver("axes", _axes, replace=True)


GROUPS = {
    "data": "the text",
    "student": "the model that learns; any other by student=hub student.name=HUB_NAME_OR_FOLDER",
    "teacher": "the model it learns from; a size is trained first, once (teacher.steps, teacher.lr, …)",
    "logits": "where the teacher's signal comes from",
    "truncation": "which of the teacher's tokens to keep",
    "temperature": "how much to soften",
    "loss": "how student and teacher are compared, per position",
    "alpha": "share of distillation over time; the rest is language modelling",
    "lr": "learning rate over time",
    "optim": "the optimizer",
    "trainer": "steps, batch, precision, device",
    "logger": "where metrics go beside metrics.jsonl",
    "sweeps": "a question answered by many runs",
}


def _axes() -> str:
    """The options of every axis and what they mean, for --help."""
    lines = []
    for group, meaning in GROUPS.items():
        lines.append(f"  {group}: {meaning}")
        lines += [f"    {f'{group}={name}':<22} {says}".rstrip() for name, says in _options(group)]
    return "\n".join(lines)


def _options(group: str) -> Iterator[tuple[str, str]]:
    if group in ("student", "teacher"):
        for name, size in SIZES.items():
            yield name, f"{size.layers} layers of width {size.hidden}, {size.parameters:,} parameters + embeddings"
    for file in sorted((SWEEPS if group == "sweeps" else CONF / group).glob("*.yaml")):
        first = file.read_text().splitlines()[0]
        if first.startswith("#"):
            yield file.stem, first[1:].strip()
        else:
            module, name = locate(first.split()[-1], group)
            yield file.stem, _functions(module)[name]
