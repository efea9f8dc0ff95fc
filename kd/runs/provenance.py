"""Code behind a result: digests of the source of each chosen component, and changes since then.

A component is the option of a config group: loss=akl, lr=cosine. A digest is that of the syntax tree, so comments,
docstrings, layout and place do not count. Source files are parsed; nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from kd.config.components import MODULES, modules_of
from kd.runs.identity import identity_settings
from kd.runs.seal import is_sealed
from kd.system import files

PACKAGE = Path(__file__).parent.parent
PACKAGES = ("rollout",)  # whose components are spread over modules
UNSEALED = "from before results were sealed: neither damage nor a change of code would be noticed"


def sources(config: dict) -> dict[str, dict[str, str]]:
    """Return digests of the source behind a flat config: group -> name -> digest, of its function and all that it uses.

    Uses are followed within the function's module, or its package if that is one of PACKAGES: functions, classes and
    constants. Components of other libraries (optim=adamw) have versions instead, in the result's environment.
    """
    chosen = [group for group in MODULES if group in identity_settings(config)]
    return {group: code for group in chosen if (code := component(group, config.get(group)))}


def component(group: str, name: str | None) -> dict[str, str]:
    """Return digests of the source of one component; empty for one of another library."""
    module = _module(group, name)
    if name is None or module is None:
        return {}
    used = sorted(_used(module, name), key=lambda place: place[1])
    return {name: digest for module, name in used if (digest := _digest(module, name))}


def differences(recorded: dict, now: dict, config: dict) -> list[str]:
    """Return the components whose sources differ between two runs of one config, and the models they learn from."""
    changed_components = []
    for group, before in recorded["sources"].items():
        if changed := sorted(name for name, code in before.items() if now["sources"].get(group, {}).get(name) != code):
            changed_components.append(f"{group}={config.get(group)} ({', '.join(changed)})")
    return changed_components + [
        f"its {role}" for role, before in recorded["origins"].items() if now["origins"].get(role) != before
    ]


def changes(result: dict) -> list[str]:
    """Return the components of a result whose source has changed since, in words: "loss=akl (akl, _gap)"."""
    changed_components, config = [], result["config"]
    for group, recorded in result.get("sources", {}).items():
        module, now = _module(group, config.get(group)), component(group, config.get(group))
        changed = [
            name for name, digest in recorded.items()
            if not module or (now.get(name) or _digest(module, name)) != digest
        ]  # fmt: skip
        if changed:
            changed_components.append(f"{group}={config.get(group)} ({', '.join(changed)})")
    return changed_components


def done_before(result: dict) -> str:
    """Return the date of an existing result, and the revision of kd that made it, as text."""
    date, revision = result.get("date"), result["environment"].get("git")
    return f"done before, {f'on {date}' if date else 'at an unknown time'}, git revision {revision or 'unknown'}"


def origin(result: dict) -> dict:
    """Return the part of a result that a student keeps for doubts().

    The result is that of its teacher, or of the run that it starts from.
    """
    sources = result.get("sources", {})
    chosen = {group: result["config"].get(group) for group in sources}
    return {
        "run": result["run"], "sealed": is_sealed(result), "config": chosen, "sources": sources,
        "origins": result.get("origins", {}),
    }  # fmt: skip


def doubts(result: dict) -> list[str]:
    """Return the reasons why this code may give another result for the same settings, and the words to type."""
    direct, others = reasons(result), _reasons_of_origins(result)
    if changes(result):
        direct[-1] += "; force=true makes the run anew"
    if others:
        others.append("to make such a run anew, remove its folder, and type the command of this run with force=true")
    return direct + others


def reasons(result: dict) -> list[str]:
    """Return the doubts about a result or an origin() itself, without its origins and without words to type."""
    texts = [] if result.get("sealed", is_sealed(result)) else [UNSEALED]
    if changed := changes(result):
        texts.append(f"old: the code of {', '.join(changed)} has changed since")
    return texts


def _reasons_of_origins(result: dict) -> list[str]:
    """Return the doubts about a result's teacher and start, and about the origins of these."""
    texts = []
    for role, origin in result.get("origins", {}).items():
        texts += [f"its {role} {origin['run']} is {reason}" for reason in reasons(origin)]
        texts += _reasons_of_origins(origin)
    return list(dict.fromkeys(texts))


def doubts_of_many(results: Iterable[dict]) -> list[str]:
    """Return the doubts about the results of a sweep, as sentences with counts."""
    results = list(results)
    sentences, count = [], len(results)
    if unsealed := sum(not is_sealed(result) for result in results):
        sentences.append(
            f"{unsealed} of {count} runs were made before results were sealed: damage would not be noticed."
        )
    if old := [changed for result in results if (changed := changes(result))]:
        which = ", ".join(sorted({component for changed in old for component in changed}))
        sentences.append(
            f"{len(old)} of {count} runs are old: the code of {which} has changed since. force=true makes them anew."
        )
    if origins := sum(bool(_reasons_of_origins(result)) for result in results):
        sentences.append(
            f"The teacher or start of {origins} of {count} runs is old, or was made before results were sealed; "
            "each run says which, and what to type, when it is shown."
        )
    return sentences


def _module(group: str, name: str | None) -> str | None:
    """Return the module of kd that defines a component; None for a component of another library."""
    return next((module for module in modules_of(group) if name in _definitions(module)), None)


@cache
def _definitions(module: str) -> dict[str, list[ast.stmt] | tuple[str, str]]:
    """Return the top-level definitions of a module by name: statements, or module and name of an import from kd."""
    definitions: dict[str, list[ast.stmt] | tuple[str, str]] = {}
    for node in ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            definitions[node.name] = [node]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}:
                definitions[name] = [*(old if isinstance(old := definitions.get(name), list) else []), node]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kd."):
            definitions |= {x.asname or x.name: (node.module.removeprefix("kd."), x.name) for x in node.names}
    return definitions


@cache
def _used(module: str, name: str) -> frozenset[tuple[str, str]]:
    """Return module and name of a definition, and of all that it uses, directly or not."""
    used, pending = set(), [(module, name)]
    while pending:
        place = pending.pop()
        definition = _definitions(place[0]).get(place[1])
        if isinstance(definition, tuple) and _is_followed(place[0], definition[0]):
            pending.append(definition)
        elif place not in used and isinstance(definition, list):
            used.add(place)
            pending += [(place[0], name) for node in definition for name in _names(node)]
    return frozenset(used)


def _is_followed(module: str, imported: str) -> bool:
    """Return True if a name that one module imports from another counts as a part of the component."""
    package = module.rpartition(".")[0]
    return package in PACKAGES and imported.rpartition(".")[0] == package


def _names(node: ast.AST) -> set[str]:
    """Return the names that a definition reads, without those that it binds itself (arguments and assignments)."""
    names = set().union(*(_names(child) for child in ast.iter_child_nodes(node)))
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        inner = [x for x in ast.walk(node) if x is not node]
        names -= {x.arg for x in inner if isinstance(x, ast.arg)}
        names -= {x.id for x in inner if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        names -= {x.name for x in inner if isinstance(x, ast.FunctionDef | ast.ExceptHandler)}
        names -= {x.asname or x.name.partition(".")[0] for x in inner if isinstance(x, ast.alias)}
    return names


@cache
def _digest(module: str, name: str) -> str | None:
    """Return the digest of a definition; None if it is gone.

    A definition that has moved is found if this module imports it from the new one.
    """
    definition = _definitions(module).get(name)
    if isinstance(definition, tuple):
        return _digest(*definition) if (PACKAGE / f"{definition[0].replace('.', '/')}.py").exists() else None
    return files.digest_of([_plain(node) for node in definition])[:16] if definition else None


def _plain(node):
    """Return a syntax tree as nested lists, without docstrings and places.

    Empty fields are left out too, since they differ between versions of Python.
    """
    if isinstance(node, list):
        return [_plain(x) for x in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return [type(node).__name__, {name: _plain(value) for name, value in fields.items()}]
