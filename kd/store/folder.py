"""Folder of a store that is being written: its specification, notes of its files, and the manifest, written last."""

from __future__ import annotations

import shlex
from pathlib import Path

from kd.errors import UserError
from kd.store.spec import describe
from kd.system import files
from kd.system.files import read_json


def begin(folder: Path, spec: dict, **about) -> None:
    """Write the specification of the store to `folder`.

    Raises UserError if the folder has the beginning of another store.
    """
    begun = read_json(folder / "begun.json")
    if begun is None:
        files.write_json(folder / "begun.json", {"of": spec, **about})
    elif begun["of"] != spec:
        begun = begun["of"]
        field = next(f for f in spec | begun if begun.get(f) != spec.get(f))
        raise UserError(
            option=folder,
            why=f"holds the beginning of another store: its {field} is {describe(begun.get(field))}, and here it is "
            f"{describe(spec.get(field))}",
            hint="choose another folder, or remove this one",
            commands=[shlex.join(["rm", "-r", str(folder)])],
        )
    elif begun.get("shards") != about.get("shards"):
        raise UserError(
            option=folder,
            why="was begun by a version of kd that cut the data into other shards",
            hint="remove this folder",
            commands=[shlex.join(["rm", "-r", str(folder)])],
        )


def note_of(folder: Path, name: str) -> dict | None:
    """Return the note of a file that is complete; None if the file is still to be written."""
    try:
        note = read_json(folder / f"{name}.json")
    except UserError:
        return None
    return note if (folder / f"{name}.safetensors").exists() else None


def notes_of(folder: Path) -> dict[str, dict]:
    """Return the notes of all complete files, by name."""
    names = sorted(p.stem for p in folder.glob("*.safetensors"))
    return {name: note for name in names if (note := note_of(folder, name))}


def commit(folder: Path, spec: dict, about: dict) -> None:
    """Write the manifest, which makes the store complete."""
    notes = {f"{name}.safetensors": note for name, note in notes_of(folder).items()}
    shards = [note for name, note in notes.items() if name.startswith("shard-")]
    sums = {key: sum(note[key] for note in shards) for key in ("count", "entries", "mass", "size")}
    sums["positions"] = sum(note.get("positions", note["count"] * about["seq_len"]) for note in shards)
    manifest = {"of": spec, **about, **sums, "files": notes}
    files.write_json(folder / "manifest.json", manifest | {"digest": files.digest_of(manifest)})
