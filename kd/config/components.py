"""Config groups: their options, and the functions that an allowlist lets them call."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from functools import cache, partial
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from kd.config import plugins
from kd.config.argument_types import check_types, parameters_of
from kd.config.sizes import SIZES
from kd.errors import UserError, first_line
from kd.system import files
from kd.system.programs import PACKAGE

CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # of a wheel, or of a checkout
SWEEPS = PACKAGE.parent / "sweeps"

# A `_target_` of a group may name a public function of the group's modules that has a yaml of its name, or one of these
# classes, and nothing else. `teachers.*` stands for every module of that package.
MODULES = {
    "loss": "objective.losses", "truncation": "objective.truncation", "target": "objective.target_transforms",
    "temperature": "objective.temperature", "routing": "objective.token_selection", "alpha": "training.schedules",
    "lr": "training.schedules", "logits": "teachers.*", "record": "objective.truncation",
    "rollout": "rollout.strategies", "data": "data.corpora data.instructions data.mixture", "plain": "data.corpora",
    "optim": "models.optimizers", "adapter": "models.adapters", "logger": "runs.loggers",
}  # fmt: skip
CLASSES = ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD")
# First parameters of a group's functions, which kd gives. A public function of an allowed plug-in (plugins.py) is an
# option of the group if it begins with these; one for data has none of them and is annotated with Corpus.
TAKES = {
    "loss": "student target", "truncation": "target", "record": "target", "target": "target",
    "temperature": "student target", "routing": "measured", "alpha": "progress", "lr": "progress", "logits": "origin",
    "rollout": "samplers", "data": "", "plain": "", "optim": "params", "adapter": "model",
    "logger": "folder about",
}  # fmt: skip
# Arguments that would make a library run code it downloaded or unpickle what it reads.
FORBIDDEN = ("trust_remote_code", "allow_pickle", "weights_only", "use_safetensors")

Node = dict[str, typing.Any]


def check_targets(node, path: str = "") -> None:
    """Refuse any `_target_` outside the allowlist, anywhere in the tree, before anything is imported or run."""
    if isinstance(node, dict):
        for key, value in node.items():
            option = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                locate(value, path)
            if key in FORBIDDEN:
                why, hint = "not accepted from a config, since it can run foreign code", f"leave {option} out"
                raise UserError(option=option, got=value, why=why, hint=hint)
            check_targets(value, option)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_targets(value, f"{path}[{index}]")


@cache
def modules_of(group: str) -> tuple[str, ...]:
    """Return the modules that define the options of a group, as paths below kd."""
    modules = MODULES.get(group, "").split()
    for module in [module for module in modules if module.endswith(".*")]:
        package = module.removesuffix(".*")
        modules.remove(module)
        modules += sorted(f"{package}.{file.stem}" for file in (PACKAGE / package).glob("[!_]*.py"))
    return tuple(modules)


def locate(target: str, path: str) -> tuple[str, str]:
    """Return the module and the name that `target` stands for in the group `path`.

    Raises UserError unless the allowlist admits it. Imports nothing, so that a refused module never runs.
    """
    module, _, name = str(target).rpartition(".")
    allowed = _allowed(path)
    if target not in allowed:
        _check_plugin(target, path, allowed)
    return module, name


def _check_plugin(target: object, path: str, allowed: list[str]) -> None:
    """Raise UserError unless `target` is a function of an allowed plug-in that can be an option of the group `path`."""
    refused = UserError(
        option=f"{path}._target_",
        got=target,
        why="not something a config may call",
        need=f"one of {', '.join(allowed)}" if allowed else "no function at all here",
    )
    if path not in TAKES or not re.fullmatch(r"\w+(\.\w+)+", str(target)):
        raise refused
    package, name = str(target).partition(".")[0], str(target).rpartition(".")[2]
    plugin = plugins.plugin_of(target)
    if plugin is None:
        if package in plugins.NO_PLUGIN:
            raise refused
        need = "a function of kd, or of a package that you allow"
        raise refused.replace(need=need, hint=plugins.how_to_allow(package))
    function = plugins.definition(str(target))
    if function is None or not takes_group(function, path):
        others = [f"{m}.{f.name}" for m, file in plugin.modules.items() for f in plugins.functions(file).values()
                  if takes_group(f, path)]  # fmt: skip
        begins = f"({TAKES[path].replace(' ', ', ')}, …)" if TAKES[path] else "annotated with -> Corpus"
        why = f"no public function {begins} of the plug-in {package}"
        hint = f"type {path}._target_={others[0]}" if others else f"write such a function in {package}"
        raise refused.replace(why=why, need=f"one of {', '.join(others)}" if others else "", hint=hint)
    if name in {option.rpartition(".")[2] for option in allowed}:
        why, hint = f"has the name of {path}={name} of kd, so that results of the two look alike", "rename the function"
        raise refused.replace(why=why, need="another name", hint=hint)


def takes_group(function: ast.FunctionDef, group: str) -> bool:
    """Return whether a function can be an option of a group, by its first parameters."""
    takes = TAKES[group].split()
    if not takes:
        annotation = ast.unparse(function.returns).strip("'") if function.returns else ""
        return annotation.rpartition(".")[2] == "Corpus"
    return [x.arg for x in (*function.args.posonlyargs, *function.args.args)][: len(takes)] == takes


def parameters(target: str, group: str) -> list[str]:
    """Return the settings of a function of a group; raise UserError for one that is not allowed."""
    module, name = locate(target, group)
    if target in CLASSES:
        return [key for key in parameters_of(load(target, group))[0] if key not in ("params", "lr")]
    function = plugins.definition(target) or definitions(module.removeprefix("kd.")).get(name)
    arguments = [*function.args.args, *function.args.kwonlyargs] if function else []
    return [argument.arg for argument in arguments if argument.arg not in TAKES[group].split()]


@cache
def _allowed(path: str) -> list[str]:
    """Return the values that `_target_` may have in a group."""
    options = builtin_files(path) if path in MODULES else ()
    modules = modules_of(path)
    allowed = sorted({f"kd.{m}.{f.stem}" for f in options for m in modules if f.stem in functions(m)})
    return [*allowed, *(CLASSES if path == "optim" else ())]


def load(target: str, path: str):
    """Return the function or class that `target` names. The object is checked again after the import."""
    module, name = locate(target, path)
    if plugins.plugin_of(target):
        component = plugins.load(target, f"{path}._target_")
        try:
            parameters_of(component)
        except Exception as error:
            why, hint = f"has annotations that cannot be read: {first_line(error)}", "correct its signature"
            raise UserError(option=f"{path}._target_", got=target, why=why, hint=hint) from None
        return component
    component = getattr(importlib.import_module(module), name)
    assert target in CLASSES or (inspect.isfunction(component) and component.__module__ == module)
    return component


@cache
def functions(module: str) -> dict[str, str]:
    """Return the public functions in the source of a module of kd, with the first line of their docstrings."""
    return {name: plugins.first_docstring_line(function) for name, function in definitions(module).items()}


def definitions(module: str) -> dict[str, ast.FunctionDef]:
    """Return the public functions of a module of kd."""
    return plugins.functions(PACKAGE / f"{module.replace('.', '/')}.py")


def meaning(target: str, group: str) -> str:
    """Return the first line of the docstring of a group's function."""
    module, name = locate(target, group)
    function = plugins.definition(target)
    return plugins.first_docstring_line(function) if function else functions(module.removeprefix("kd."))[name]


def build(node: Node, path: str):
    """Return the function that a node names, with the node's other keys bound as arguments.

    The caller passes the remaining arguments. Raises UserError for a wrong target, name or type.
    """
    settings = {k: v for k, v in node.items() if k != "_target_"}
    function = load(node["_target_"], path)
    check_types(function, settings, path)
    return partial(function, **settings)


def typed(value) -> str:
    """Return a value in the form in which Hydra reads it after `name=`."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{typed(x)}' for name, x in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:+-]+", value):
        return quoted(value)
    return str(value)


def quoted(text: str) -> str:
    """Return a text in quotes of Hydra's grammar; in double ones, so that a shell takes it in single ones."""
    return QuotedString(text, Quote.double).with_quotes()


PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}  # as Lightning calls them


def check_sweep(name: str | None) -> None:
    """Raise UserError for a sweep whose files would be outside the folder of sweeps."""
    if name is not None and not files.is_name(name):
        raise UserError(option="sweep", got=name, need="a name and no path", hint="type e.g. sweep=mine")


def flat(node: Node, prefix: str = "") -> Node:
    """Return a flat dict: nested keys are joined with dots, and `_target_` becomes the name that it ends in."""
    out: Node = {}
    for key, value in node.items():
        if key == "_target_":
            out[prefix.rstrip(".")] = value.rpartition(".")[2]
        elif isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def option_files(group: str) -> list[Path]:
    """Return the option files of a config group: those of kd, then those of others.

    The group `record` has those of `truncation`, since a store can keep the same parts of a distribution.
    """
    folder = "truncation" if group == "record" else group
    others = [file for place in plugins.folders() for file in sorted((place / folder).glob("*.yaml"))]
    return builtin_files(group) + others


def builtin_files(group: str) -> list[Path]:
    """Return the option files of a group that belong to kd."""
    folder = {"sweeps": SWEEPS, "record": CONF / "truncation"}.get(group, CONF / group)
    return sorted(folder.glob("*.yaml"))


def builtin_option_names(group: str) -> list[str]:
    """Return the names of the options of a group that belong to kd."""
    return [*(SIZES if group in ("student", "teacher") else ()), *(file.stem for file in builtin_files(group))]


def option_names(group: str) -> list[str]:
    """Return the names of the options of a config group."""
    sizes = SIZES if group in ("student", "teacher") else ()
    return [*sizes, *(file.stem for file in option_files(group))]


def as_record(truncation: Node) -> Node:
    """Return a node of conf/truncation as an option of the group `record`."""
    return {key: value for key, value in truncation.items() if key != "biased"} | {"path": None}


PRESETS = ("experiment", "method")  # groups whose options choose options and settings of other groups

GROUPS = {
    "method": "a way of distilling by name; what is typed beside it comes first",
    "experiment": "models, data and trainer of a setting that recurs; what is typed beside it comes first",
    "data": "the text",
    "plain": "plain text beside data=instructions: for start=…, lm=plain and the tokenizer",
    "student": "the model that learns; any other by student=hub student.name=HUB_NAME_OR_FOLDER",
    "start": "what it was before",
    "teacher": "the model it learns from; a size is trained first, once (teacher.steps, teacher.lr, …)",
    "logits": "where the teacher's signal comes from",
    "record": "what a store of logits keeps: of a teacher's own training (logits=none), or for logits=offline to read",
    "truncation": "which of the teacher's tokens to keep",
    "target": "what becomes of a truncated target, before it is softened",
    "temperature": "how much to soften",
    "loss": "how student and teacher are compared, per position",
    "routing": "which tokens are distilled, the others by language modelling alone; or which are hard, for loss=atkd",
    "rollout": "who writes the responses of data=instructions that are learned from",
    "alpha": "share of distillation over time; the rest is language modelling",
    "lr": "learning rate over time",
    "optim": "the optimizer",
    "adapter": "weights that learn in place of those of the student",
    "trainer": "steps, batch, precision, device",
    "logger": "where metrics go beside metrics.jsonl",
    "sweeps": "a question answered by many runs",
}
