"""A store of logits, and ways to damage it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kd.errors import UserError
from tests.small import TOP, here

OFFLINE = ("logits=offline", *TOP)


def only(root: Path) -> Path:
    """The one store in a root."""
    (store,) = (root / "stores").iterdir()
    return store


def refusal(root: Path, *words: str) -> str:
    """Return the error of a run with this store, which is refused before it starts."""
    with pytest.raises(UserError) as caught:
        here(root, *OFFLINE, *words)
    assert not list(root.glob("fkl*/metrics.jsonl"))
    return str(caught.value)


def times(path: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in path.glob("*.safetensors")}


# Damage


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def change_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"entries": 9600', '"entries": 9601'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, 1),
    "truncated": truncate,
    "longer": lengthen,
    "gone": Path.unlink,
}
SHARDS = ("shard-00000.safetensors", "shard-00005.safetensors", "shard-00007.safetensors")
CASES = [(SHARDS[1], damage) for damage in DAMAGE]
CASES += [(name, "flipped") for name in (SHARDS[0], SHARDS[2], "head.safetensors", "validation.safetensors")]
CASES += [("manifest.json", damage) for damage in ("flipped", "first byte", "truncated")]
CASES += [("head.safetensors", "gone")]
