"""Conversion of the composed config to plain containers: missing values, interpolations and home folders."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import UserError
from kd.system import files

PATHS = ("root", "path", "files", "name", "tokenizer")  # names of settings that can be paths
MISSING = "???"  # as Hydra has it


def to_node(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain containers, with ~ expanded; raise UserError where a value is missing."""
    try:
        node = {key: _value(cfg, key) for key in cfg if key != "hydra"}
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from None
    if missing := sorted(_missing(node)):
        raise UserError(option=missing[0], why="is needed here", hint=f"type {missing[0]}=VALUE")
    expand_paths(node)
    return node


def _value(cfg: DictConfig, key: str) -> Any:
    if OmegaConf.is_missing(cfg, key):
        return MISSING
    value = cfg[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _missing(node: Any, path: str = "") -> list[str]:
    if isinstance(node, dict):
        return [name for k, v in node.items() for name in _missing(v, f"{path}.{k}" if path else str(k))]
    return [path] if node == MISSING else []


def expand_paths(node: dict[str, Any]) -> None:
    """Replace ~ by the home folder in all settings that may be paths, in place."""
    for key, value in node.items():
        if isinstance(value, dict):
            expand_paths(value)
        elif key in PATHS:
            several = isinstance(value, list)
            expanded = [files.expanded(x) if isinstance(x, str) else x for x in (value if several else [value])]
            node[key] = expanded if several else expanded[0]
