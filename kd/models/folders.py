"""Folders of models: what a name that is no such folder was meant to be, and which of a model's files are missing."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kd.errors import UserError

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
MOST_NAMED = 5  # files and folders in a message


def check_name(name: str, subject: str) -> None:
    """Raise UserError for a path without a folder. subject: of the error, see kd.models.hub.from_hub."""
    if Path(name).is_dir() or _may_be_of_hub(name):
        return
    path = _absolute(name)
    if path.is_dir():
        why, hint = "~ is not replaced here", f"type {path}"
    else:
        why, hint = "it is a file" if path.is_file() else missing(name), meant(name)
    need = "the folder of a model, or the name of one of the Hub"
    raise UserError(option=subject, why=f"could not be loaded: {why}", need=need, hint=hint)


def check_config(folder: Path, subject: str) -> None:
    """Raise UserError for a folder without config.json."""
    if (folder / CONFIG).exists():
        return
    below = sorted(path.parent for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}") for path in folder.glob(pattern))
    one_below = f"type {' or '.join(map(str, below[:MOST_NAMED]))} in its place"
    raise UserError(
        option=subject,
        why=f"could not be loaded: {folder} has no {CONFIG}; {listed(folder)}",
        need=f"a folder with {CONFIG} and {WEIGHTS[0]}, as save_pretrained of transformers writes it",
        hint=one_below if below else "give the folder of a downloaded model, or the name of one of the Hub",
    )


def check_weights(folder: Path, subject: str) -> None:
    """Raise UserError for a folder without weights as safetensors."""
    if any((folder / name).exists() for name in WEIGHTS):
        return
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(kind))
    convert = f"save the weights of {others[0]} as safetensors with save_pretrained of transformers" if others else ""
    raise UserError(
        option=subject,
        why=f"could not be loaded: {folder} has neither {' nor '.join(WEIGHTS)}; {listed(folder)}",
        need="weights as safetensors, since reading other formats may run code" if others else "weights as safetensors",
        hint=convert or "download the model again, or wait until it is saved",
    )


def missing(name: str) -> str:
    """Return which part of a path does not exist, and what its parent holds."""
    parent, part = _nearest(name)
    return f"{parent} has no folder {part!r}; {listed(parent, folders=True)}"


def meant(name: str) -> str:
    """Return what to type for a name that is no folder, if a model's folder may be meant; else an empty text."""
    path = _absolute(name)
    if path.is_file():
        return f"type {path.parent}, the folder of that file" if _is_model(path.parent) else ""
    parent, part = _nearest(name)
    below = path.relative_to(parent).parts[1:]
    for similar in difflib.get_close_matches(part, [entry.name for entry in parent.iterdir() if entry.is_dir()]):
        for folder in (parent.joinpath(similar, *below), parent / similar):
            if _is_model(folder):
                return f"type {folder}, if that is meant"
    return ""


def listed(folder: Path, folders: bool = False) -> str:
    """Return a clause on the content of a folder. folders: its folders alone."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in visible if path.is_dir() or not folders)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"it has {', '.join(names[:MOST_NAMED])}{more}" if names else f"it has no {'folder' if folders else 'file'}"


def _may_be_of_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _absolute(name: str) -> Path:
    """Return the absolute path of a name, with ~ replaced if there is such a user."""
    return Path(os.path.expanduser(name)).absolute()


def _nearest(name: str) -> tuple[Path, str]:
    """Return the longest part of a path that is a folder, and the name that it lacks."""
    path = _absolute(name)
    parent = next(parent for parent in path.parents if parent.is_dir())
    return parent, path.relative_to(parent).parts[0]
