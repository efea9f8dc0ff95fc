"""Errors that a person can mend: fields, and the one place that puts them into words."""

from __future__ import annotations

import copy
import errno
import re
from collections.abc import Iterable

# A reason that begins with one of these has the option as its subject.
PREDICATES = (
    "is", "was", "has", "does", "do", "would", "could", "cannot", "ran",
    "holds", "needs", "takes", "begins", "writes", "reads", "stores", "covers", "keeps",
)  # fmt: skip


class UserError(ValueError):
    """Mistake that the person at the keyboard can mend, printed without a traceback.

    Its fields are clauses, without a capital letter in front and without a full stop at the end; `str` words them as
        option=got with conflict: why; need …. Hint:
          command
    A message in one piece, which is printed as it is, is for what no option, file or URL is to blame for.

    option: the option ("truncation.k"), file or URL that is wrong; an option also as it is typed ("truncation.k=0").
    got: its value; ... where it has none.
    conflict: the other setting ("logits=none"), where two contradict each other.
    why: the reason, where value and need do not say it: a clause, or a predicate of the option ("is damaged: …").
    need: what would be right, as a noun phrase.
    hint: what to do, beginning with a verb ("type truncation.k=10").
    commands: lines to type that do what the hint says.
    """

    def __init__(
        self,
        why: object = "",
        *,
        option: object = None,
        got: object = ...,
        conflict: str = "",
        need: str = "",
        hint: str = "",
        commands: Iterable[str] = (),
    ):
        self.why, self.need, self.hint, self.conflict = str(why), need, hint, conflict
        self.option, self.got = None if option is None else str(option), got
        if got is ... and (word := re.match(r"([\w.]+)=(.*)", self.option or "", re.DOTALL)):
            self.option, self.got = word.groups()
        self.commands = tuple(commands)
        super().__init__(str(self))

    def __str__(self) -> str:
        if not any((self.option, self.need, self.hint, self.conflict, self.commands)):
            return self.why  # a message in one piece
        reason = "; ".join(filter(None, (self.why, self.need and f"need {self.need}")))
        subject = self._subject()
        joint = " " if reason.partition(" ")[0] in PREDICATES else ": "
        text = f"{subject}{joint}{reason}" if subject and reason else subject or _capitalised(reason)
        if self.hint:
            text = _with_sign(text) + ("\n" if "\n" in text else " ") + _capitalised(self.hint)
        return "\n  ".join([_with_sign(text, ":" if self.commands else "."), *self.commands])

    def _subject(self) -> str:
        """Return what is wrong, as it was typed."""
        value = "" if self.got is ... else f"={typed(self.got)}"
        conflict = f" with {self.conflict}" if self.conflict else ""
        return f"{self.option or ''}{value}{conflict}".strip()

    def replace(self, **fields: object) -> UserError:
        """Return a copy with other fields."""
        other = copy.copy(self)
        vars(other).update(fields)
        other.args = (str(other),)
        return other


def typed(value: object) -> str:
    """Return a value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    return str(value)


def _capitalised(text: str) -> str:
    """Return a sentence with a capital letter in front, unless its first word is a name or holds a sign."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text[:1].upper() + text[1:] if first.rstrip(",").isalpha() else text


def _with_sign(text: str, sign: str = ".") -> str:
    """Return a sentence with a sign at its end, unless it has one."""
    return text if text.endswith((".", ":", "?", "!", "…")) else text + sign


def check(option: str, got: object, valid: bool, need: str, hint: str = "") -> None:
    """Raise UserError unless the value that an option got is valid."""
    if not valid:
        raise UserError(option=option, got=got, need=need, hint=hint)


# What may be a mistake: whether an OSError is one, is_mistake() tells.
MISTAKES = (UserError, OSError)
PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


def is_mistake(error: BaseException) -> bool:
    """Return whether a person can mend it: a UserError, or a place that cannot be read or written to."""
    kinds = (UserError, PermissionError, NotADirectoryError, FileExistsError)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.errno in PLACE)


def for_people(error: Exception) -> UserError:
    """Return a mistake with what to do about it; raise any other error again."""
    if isinstance(error, UserError):
        return error
    if not is_mistake(error):
        raise error
    hint = "choose a folder that can be read and written, e.g. by root=/other/folder (for a report, --root)"
    return UserError(error, hint=hint)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
