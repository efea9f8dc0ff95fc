"""Digests in a result: of the files of a run, and of the result itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kd.system import files

# Responses of the student to the validation prompts (kd/evaluation/responses.py), and the curve of its ExAccErr.
RESPONSES, EXACCERR = "responses.jsonl", "exaccerr.json"
ADAPTER = "adapter"  # folder of the adapter alone, for adapter.export=both
# What result.json keeps digests of, beside its own; folders with all that is in them.
STUDENTS = "students"  # models of all validations, with trainer.keep=all
SEALED = ("config.json", "metrics.jsonl", RESPONSES, EXACCERR, "student", ADAPTER, STUDENTS)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digests of files, and of all files in folders, by name relative to a folder.

    Hidden files are left out.
    """
    paths = [p for name in names for p in (folder / name, *(folder / name).rglob("*")) if p.is_file()]
    paths = sorted(p.relative_to(folder) for p in paths)
    return {p.as_posix(): files.digest(folder / p) for p in paths if not any(x[0] == "." for x in p.parts)}


def is_sealed(result: dict) -> bool:
    """Return True if a result has digests. Results of earlier versions of kd have none."""
    return "digest" in result or "files" in result


def is_whole(result) -> bool:
    """Return True if a result agrees with its own digest, or has none."""
    return isinstance(result, dict) and (not is_sealed(result) or result.get("digest") == digest_of_result(result))


def digest_of_result(result: dict) -> str:
    """Return the digest of a result, computed without the digest field."""
    return files.digest_of({k: v for k, v in result.items() if k != "digest"})
