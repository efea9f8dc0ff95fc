"""Specification of a store: its teacher, data and truncation. Writers and readers share it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from kd.errors import UserError
from kd.system.files import read_json

FULL = {"name": "full"}
NOT_NESTED: Mapping[str, str] = {}
FIELDS = ("format", "teacher", "weights", "tokenizer", "data", "truncation", "precision", "seed")
NAME = re.compile(r"(shard-\d+|head|validation)\.safetensors")


def row_hash(ids: np.ndarray) -> int:
    """Return the hash of the tokens [T] that a teacher reads. It does not depend on their integer type."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids, np.uint32).tobytes()) >> 1  # fits an int64


def draws_of(truncation: dict) -> int | None:
    """Return the draws per position of a store of samples; None for any other store."""
    return truncation.get("draws") if truncation["name"] == "random" else None


def covers(stored: dict, requested: dict, nested: Mapping[str, str] = NOT_NESTED) -> bool:
    """Return True if a store of one truncation holds all that another keeps. Both are {"name": …, setting: value}.

    nested: direction of each setting with which the requested truncation of a plug-in keeps less.
    """
    kinds = stored["name"], requested["name"]
    if kinds[0] == "full" or stored == requested:
        return True
    if not are_comparable(stored, requested, nested):
        return False
    if nested:
        return all(
            value == stored[name] or (name in nested and _is_past(value, stored[name], nested[name]))
            for name, value in requested.items()
        )
    if "random" in kinds:
        return kinds == ("random", "random") and requested["draws"] <= stored["draws"]
    # A truncation that sets no p or k needs it without limit.
    return requested["name"] != "full" and all(requested.get(x, math.inf) <= stored.get(x, math.inf) for x in "pk")


def are_comparable(stored: dict, requested: dict, nested: Mapping[str, str] = NOT_NESTED) -> bool:
    """Return True if kd can find out whether one truncation keeps a part of another that differs from it."""
    if {stored["name"], requested["name"]} <= {"full", "random", "top_k", "top_p", "top_p_k"}:
        return True
    return bool(nested) and stored.keys() == requested.keys() and stored["name"] == requested["name"]


def _is_past(value: object, bound: object, direction: str) -> bool:
    """Return True if a number is higher or lower than another; False for anything but numbers."""
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in (value, bound)):
        return False
    return value > bound if direction == "higher" else value < bound  # type: ignore[operator]


def describe(value) -> str:
    """Return a field of a store as text: top_k k=50."""
    if not isinstance(value, dict):
        return str(value)
    return " ".join([str(value.get("name", "")), *(f"{k}={v}" for k, v in value.items() if k != "name")]).strip()


def quote_words(words: str) -> str:
    """Return the words of a command from a file, quoted so that a shell runs nothing in them."""
    return shlex.join(shlex.split(words))


def check_manifest(manifest: dict) -> None:
    """Raise an error for a manifest that names files outside of its store or lacks a field, whatever its origin.

    The words of its command are quoted again, since messages advise people to type them.
    """
    if foreign := [name for name in manifest["files"] if not NAME.fullmatch(name)]:
        raise ValueError(f"{foreign[0]} is no file of a store")
    if missing := [f"of.{field}" for field in FIELDS if field not in manifest["of"]]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    manifest["words"] = quote_words(manifest["words"])


def before_manifest(folder: Path) -> dict:
    """Return the content of a store's begun.json, for use before its manifest is written."""
    try:
        about = (read_json(folder / "begun.json") or {}).get("about", {})
        return about | {"words": quote_words(about["words"])} if "words" in about else about
    except (UserError, AttributeError, TypeError, ValueError):
        return {}
