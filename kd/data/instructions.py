"""Prompts and responses: instructions and their answers, conversations, or functions and their bodies.

1. kd/data/tables.py     rows of files and of the Hub
2. kd/data/columns.py    rows as examples (examples.py), whatever their columns are called; functions() has others
3. kd/data/templates.py  the turns of an example as a prompt and a response, in tokens
"""

from __future__ import annotations

import ast
import datetime
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from kd.data import columns, corpora, tables
from kd.data.corpora import Corpus, Pairs
from kd.data.examples import Example
from kd.data.tables import Documents, Joined
from kd.errors import UserError, check
from kd.system import files as on_disk


def instructions(
    seq_len: int, files: str | None = None, name: str | None = None, subset: str | None = None, split: str = "train",
    revision: str | None = None, prompt: str | None = None, response: str | None = None, template: str | None = None,
    prompt_len: int | None = None, turns: str = "last", date: str | None = None,
) -> Corpus:  # fmt: skip
    """Prompts and responses to learn: from files, the Hub, or functions of Python's standard library.

    files: a .jsonl, .json or .parquet, or a pattern. name, subset, split, revision: of a dataset of the Hub, or of a
    folder of one. prompt, response: names of columns that are not in shapes.SHAPES; a column may hold text, or a list
    of messages with role and content. template: alpaca, chat or plain; None takes plain for functions, chat for
    messages if the tokenizer has a chat template, and alpaca otherwise. prompt_len: maximum in tokens; rows with longer
    prompts are left out; None for half of seq_len. turns: the turns of the assistant that are learned, last or all,
    each in a row of its own. date: YYYY-MM-DD, for chat templates that write today's date. Raises UserError for
    settings that have no effect, or exclude each other.
    """
    check("data.template", template, template in (None, "alpaca", "chat", "plain"), "alpaca, chat or plain")
    check("data.turns", turns, turns in ("last", "all"), "last or all")
    if date is not None:
        _check_date(date)
    if prompt_len is None:
        prompt_len = max(1, seq_len // 2)
    check("data.prompt_len", prompt_len, 1 <= prompt_len <= seq_len, f"from 1 to data.seq_len={seq_len} tokens")
    if files and name:
        why = "each of them names the examples"
        hint = "leave data.files or data.name out"
        raise UserError(option="data.files", got=files, conflict=f"data.name={name}", why=why, hint=hint)
    of_hub = {"subset": (subset, None), "split": (split, "train"), "revision": (revision, None)}
    of_tables = {"prompt": (prompt, None), "response": (response, None), "turns": (turns, "last")}
    for option, (value, usual) in ({} if name else of_hub if files else of_hub | of_tables).items():
        if value != usual:
            which = "data.name=… or data.files=…" if option in of_tables else "data.name=…"
            why, hint = f"would do nothing without {which}", f"leave data.{option} out"
            raise UserError(option=f"data.{option}", got=value, why=why, hint=hint)
    fingerprint: dict = dict(prompt_len=prompt_len, template=template, prompt=prompt, response=response)
    fingerprint |= {
        option: value for option, value, usual in (("turns", turns, "last"), ("date", date, None)) if value != usual
    }
    load: Callable[[], Documents | Joined | list[Example]]
    if name:
        fingerprint |= dict(
            name=name,
            subset=subset,
            split=split,
            revision=revision,
            content=on_disk.folder_fingerprint(name),
            version=ROWS,
        )
        rows = partial(corpora.hub_rows, name, subset, split, revision)
        load = partial(_of_table, rows, prompt, response, turns, f"data.name={name}")
    elif files:
        paths, builder = corpora.local_files(files, corpora.TABLES)
        fingerprint |= dict(files=corpora.stamps(paths), version=ROWS)
        rows = partial(tables.local_tables, files, paths, builder)
        load = partial(_of_files, rows, paths, prompt, response, turns, f"data.files={files}")
    else:
        sources, template = corpora.standard_library(), template or "plain"
        fingerprint |= dict(name="functions", version=3, template=template, content=corpora.digest_all(sources))
        load = partial(functions, sources)
    return Corpus(load, fingerprint, pairs=Pairs(template, prompt_len, date))


ROWS = 2  # since all columns and keys are looked at, and rows are what a chat template writes


def _of_table(rows: Callable, prompt: str | None, response: str | None, turns: str, option: str) -> Documents:
    return columns.examples(rows(), prompt, response, turns, option)


def _of_files(
    rows: Callable, paths: list[Path], prompt: str | None, response: str | None, turns: str, option: str
) -> Joined:
    pairs = zip(rows(), paths, strict=True)
    return Joined([columns.examples(table, prompt, response, turns, option, path) for table, path in pairs])


def _check_date(date: str) -> None:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise UserError(option="data.date", got=date, need="a day", hint="type e.g. data.date=2026-01-31") from None


# Functions

LONGEST_PROMPT, LONGEST_BODY = 600, 1000  # characters of a prompt and of a body; some 9 of 10 have no more


def functions(sources: Iterable[str]) -> list[Example]:
    """Return functions and methods with a docstring as examples, each once. The response to the signature is the body.

    Prompt and response together are whole, unchanged lines of the source. A function is on the side of the split that
    its file is on, so a student pre-trained on data=python has not read validation rows. Functions within functions are
    left out, since they are part of another body. Bodies that do nothing, or only raise an error, are left out too.
    """
    examples: dict[str, Example] = {}
    for source in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes, in others' source
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # a template, or of another version of Python
        lines = source.split("\n")  # as ast counts them; splitlines() splits at form feeds too
        for function in _defined(tree):
            prompt, response = _signature_and_body(function, lines)
            if response:
                examples.setdefault(prompt, Example.from_texts(("user", prompt), response=response, document=source))
    return list(examples.values())


def _defined(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _defined(child)


def _signature_and_body(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    """Return signature with docstring, and body; two empty texts for a function that is left out."""
    docstring, *body = function.body
    if len((ast.get_docstring(function) or "").split()) < 3 or all(map(_idle, body)):
        return "", ""
    first = min(node.lineno for node in (function, *function.decorator_list)) - 1
    # Behind the closing quotes, so that the response begins with the end of a line: no tokenizer joins the two.
    last = (docstring.end_lineno or docstring.lineno) - 1  # from a parser, it has an end
    quoted = lines[last].encode()[: docstring.end_col_offset].decode()
    prompt = "\n".join([*lines[first:last], quoted])
    response = "\n".join([lines[last].removeprefix(quoted), *lines[last + 1 : function.end_lineno]])
    if len(prompt) > LONGEST_PROMPT or len(response) > LONGEST_BODY:
        return "", ""
    return prompt, response


def _idle(statement: ast.stmt) -> bool:
    """Return True for a statement that is no useful response: pass, raise, `...` or return None."""
    value = getattr(statement, "value", None)
    nothing = value is None or (isinstance(value, ast.Constant) and value.value in (None, ...))
    return isinstance(statement, ast.Pass | ast.Raise) or (isinstance(statement, ast.Expr | ast.Return) and nothing)
