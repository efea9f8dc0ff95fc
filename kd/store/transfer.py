"""Copies of a store: merging the parts of several machines in a folder, and upload of a complete store to a URL."""

from __future__ import annotations

import shutil
from pathlib import Path

from kd.errors import UserError
from kd.store.folder import begin, commit, notes_of
from kd.store.spec import quote_words
from kd.system import files, programs
from kd.system.console import counted, track
from kd.system.files import read_json
from kd.system.remote import Remote


def merge(folder: Path, parts: list[Path]) -> None:
    """Join the parts of several machines in `folder`.

    Raises UserError if the parts are not of one store, if one is damaged, or if a shard is missing.
    """
    begun = {part: _begun(part) for part in parts}
    for note in begun.values():
        begin(folder, note["of"], about=note["about"], shards=note["shards"])
    notes = {name: (part, note) for part in parts for name, note in notes_of(part).items()}
    missing = [name for name in ("head", "validation", *begun[parts[0]]["shards"]) if name not in notes]
    if missing:
        words = quote_words(begun[parts[0]]["about"]["words"])
        raise UserError(
            f"{counted(len(missing), 'file is', 'files are')} in none of the parts, {missing[0]}.safetensors among "
            "them",
            hint="give the part that has these files, or write that part, where NUMBER is the number of the part",
            commands=[f"{programs.command('store')} write {words} part=NUMBER/OF"],
        )
    for name, (part, note) in track(notes.items(), "merging"):
        source = part / f"{name}.safetensors"
        with files.atomic(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
            if files.digest(temporary) != note["digest"]:
                why, hint = "is damaged: its bytes are not those that were written", "copy that file again"
                raise UserError(option=source, why=why, hint=hint)
        files.write_json(folder / f"{name}.json", note)
    commit(folder, begun[parts[0]]["of"], begun[parts[0]]["about"])


def _begun(part: Path) -> dict:
    """Return the specification of a part of a store. Raises UserError for a folder that is no part."""
    begun = read_json(part / "begun.json")
    if begun is None:
        why, hint = "is no part of a store: the folder has no begun.json", "give the folders of the parts"
        raise UserError(option=part, why=why, hint=hint)
    if "shards" not in begun:
        why = "was recorded in training, by one process: there is nothing to merge"
        raise UserError(option=part, why=why, hint="use this folder as a store as it is")
    return begun


def upload(folder: Path, url: str) -> None:
    """Copy a complete store to a URL, the manifest last."""
    manifest = files.load_json(folder / "manifest.json")
    remote_manifest = read_json(files.download(url, folder, "manifest.json"))
    if remote_manifest and remote_manifest["of"] != manifest["of"]:
        raise UserError(
            option=url,
            why=f"holds another store, of {remote_manifest['of']['teacher']}",
            hint=f"choose another URL for the store in {folder}",
        )
    if remote_manifest:
        return  # another machine was first
    remote = Remote(url, folder)
    try:
        unsent = [name for name, note in manifest["files"].items() if not _is_sent(remote, name, note)]
        for name in track([*unsent, "manifest.json"], f"copying to {url}"):
            remote.put(name)
    except UserError as error:
        raise UserError(
            option=url,
            why=f"the store is whole in {folder}, and could not be copied there: {error}",
            hint="type the same command again to continue copying",
        ) from error


def _is_sent(remote: Remote, name: str, note: dict) -> bool:
    """Return True if a file is at a URL already. Recorder.send writes a note after each file."""
    return remote.read(f"{name.partition('.')[0]}.json") == note
