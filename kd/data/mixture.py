"""Mixtures of texts: parts with weights, which share a tokenizer and the training tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from kd.config import argument_types
from kd.data import corpora
from kd.data.corpora import Corpus
from kd.errors import UserError

SOURCES = ("python", "text", "hub")  # functions of kd.data.corpora whose documents are plain text
NAME = re.compile(r"[A-Za-z][\w-]*")  # of a part, which becomes a part of the names of metrics
EXAMPLE = "data.parts='{web: {source: hub, name: NAME, weight: 0.7}, code: {source: python, weight: 0.3}}'"


class Part(NamedTuple):
    """One text of a mixture."""

    name: str
    corpus: Corpus
    share: float  # of the training tokens; the shares of all parts add up to 1


@dataclass(frozen=True)
class Mixture(Corpus):
    """Several texts. Its own load() gives no documents: each part is read by itself."""

    parts: tuple[Part, ...] = ()


def mixture(parts: dict) -> Corpus:
    """Several texts with weights, which are their shares of the training tokens; one tokenizer for all.

    parts: name -> source (python, text or hub), weight, and the settings of that source. Weights are relative: 7 and 3
    are 0.7 and 0.3. Raises UserError, which names the part, for a nested part or a setting that its source lacks.
    """
    if not parts:
        raise UserError(option="data.parts", got=str(parts), need="at least one part", hint=f"type e.g. {EXAMPLE}")
    weights = {str(name): _weight(str(name), settings) for name, settings in parts.items()}
    texts = {str(name): _corpus(str(name), settings) for name, settings in parts.items()}
    total = sum(weights.values())
    chosen = tuple(Part(name, text, weights[name] / total) for name, text in texts.items())
    fingerprint = {"mixture": [[part.name, part.share, part.corpus.fingerprint] for part in chosen]}
    return Mixture(list, fingerprint, parts=chosen)


@contextmanager
def errors_of(part: str) -> Iterator[None]:
    """Name the part of a mixture in errors about its text: data.files becomes data.parts.PART.files."""
    try:
        yield
    except UserError as error:
        option = error.option or ""
        named = option if option.startswith("data.parts.") else _within(option, part)
        fields = {name: _within(getattr(error, name), part) for name in ("hint", "conflict", "need")}
        why = error.why if f".{part}." in named else f"{error.why} (part {part} of the mixture)"
        raise error.replace(option=named or None, why=why, **fields) from error


def _within(text: str, part: str) -> str:
    """Return a text with the settings of a source as those of a part."""
    names = "|".join({name for source in SOURCES for name in argument_types.parameters_of(getattr(corpora, source))[0]})
    return re.sub(rf"(?<![\w.])data\.({names})\b", rf"data.parts.{part}.\1", text)


def _weight(name: str, settings: object) -> float:
    option = f"data.parts.{name}"
    if not NAME.fullmatch(name):
        raise UserError(option=option, why="is no name of a part", need="letters, digits, - and _, a letter first")
    if not isinstance(settings, dict):
        raise UserError(
            option=option, got=settings, need="a source, a weight and settings", hint=f"type e.g. {EXAMPLE}"
        )
    weight = settings.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        got = ... if weight is None else weight
        need = "a weight above 0, the part's share of the training tokens"
        raise UserError(option=f"{option}.weight", got=got, need=need, hint=f"type e.g. {EXAMPLE}")
    return float(weight)


def _corpus(name: str, settings: dict) -> Corpus:
    option, source = f"data.parts.{name}", settings.get("source")
    if source not in SOURCES:
        why = {
            "mixture": "a part cannot be a mixture itself",
            "instructions": "a part is plain text, and these are prompts with responses",
            "markov": "this text has a vocabulary of its own, and the parts share a tokenizer",
        }.get(str(source), "" if source else "is needed here")  # fmt: skip
        need, hint = f"one of {', '.join(SOURCES)}", f"type e.g. {EXAMPLE}"
        got = source if source else ...
        raise UserError(option=f"{option}.source", got=got, why=why, need=need, hint=hint)
    make = getattr(corpora, source)
    given = {key: value for key, value in settings.items() if key not in ("source", "weight")}
    accepted, _ = argument_types.parameters_of(make)
    for key, value in given.items():
        if key not in accepted:
            need = f"one of {', '.join(['source', 'weight', *accepted])}"
            raise UserError(option=f"{option}.{key}", got=value, why="no such option of this part", need=need)
    argument_types.check_types(make, given, option)
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and key not in given:
            raise UserError(option=f"{option}.{key}", why=f"is needed for source={source}", hint=f"type e.g. {EXAMPLE}")
    with errors_of(name):
        return make(**given)
