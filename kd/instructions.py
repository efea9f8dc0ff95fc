"""Prompts and responses: instructions and their answers, conversations, or functions and their bodies.

1. examples   of files or of the Hub, whatever their columns are called, or functions of the Python standard library
2. templates  write the turns of an example down as one prompt: alpaca, plain, or the tokenizer's own chat template
3. tokens     of prompts and of responses; what looks like a special token in somebody's text stays text
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from kd import corpora
from kd import files as on_disk
from kd.corpora import Corpus, Documents, Pairs
from kd.errors import UserError
from kd.tokenizer import bos_of

Turn = tuple[str, str]  # role (system, user, input, assistant, …) and what was said


class Example(NamedTuple):
    """What is asked, and the response to it that is to be learned."""

    turns: tuple[Turn, ...]  # none where there is nothing to learn
    response: str
    conversation: bool = False  # whether it was one, with roles, or columns of text
    document: str = ""  # the whole that it is a part of, if it is

    @property
    def asked(self) -> str:
        """What decides on the side of the split: the document, as in plain text, or the prompt without layout."""
        return self.document or " ".join(word for _, said in self.turns for word in said.split())


def instructions(
    seq_len: int, files: str | None = None, name: str | None = None, subset: str | None = None, split: str = "train",
    revision: str | None = None, prompt: str | None = None, response: str | None = None, template: str | None = None,
    prompt_len: int | None = None,
) -> Corpus:  # fmt: skip
    """Prompts and responses, of which the responses are learned: of files, of the Hub, or else functions() of Python.

    files: a .jsonl, .json or .parquet, or a pattern. name, subset, split, revision: of a dataset of the Hub, or of a
    folder of one. prompt, response: its columns, where their names are none of SHAPES; a column may hold text, or a
    list of messages with role and content. template: alpaca, chat or plain; None takes plain for functions, chat for
    messages where the tokenizer has a chat template, and alpaca for all else. prompt_len: longer prompts are left out,
    tokens; None for half of seq_len. Raises UserError for settings that do nothing, or do not go together.
    """
    if template not in (None, "alpaca", "chat", "plain"):
        raise UserError(f"data.template={template}: need alpaca, chat or plain.")
    if prompt_len is None:
        prompt_len = max(1, seq_len // 2)
    elif not 1 <= prompt_len <= seq_len:
        raise UserError(f"data.prompt_len={prompt_len}: need from 1 to data.seq_len={seq_len} tokens.")
    if files and name:
        raise UserError(f"data.files={files} and data.name={name}: one of them says where the examples are.")
    of_hub = {"subset": (subset, None), "split": (split, "train"), "revision": (revision, None)}
    of_tables = {"prompt": (prompt, None), "response": (response, None)}
    for option, (value, usual) in ({} if name else of_hub if files else of_hub | of_tables).items():
        if value != usual:
            which = "data.name=… or data.files=…" if option in of_tables else "data.name=…"
            raise UserError(f"data.{option}={value} would do nothing without {which}: leave it out.")
    how = dict(prompt_len=prompt_len, template=template, prompt=prompt, response=response)
    if name:
        how |= dict(name=name, subset=subset, split=split, revision=revision, content=on_disk.stamp(name))
        rows = partial(corpora.hub_rows, name, subset, split, revision)
        load = partial(_examples, rows, prompt, response, f"data.name={name}")
    elif files:
        paths, builder = corpora.local_files(files, corpora.TABLES)
        how |= dict(files=corpora.stamps(paths))
        rows = partial(corpora.local_rows, files, paths, builder)
        load = partial(_examples, rows, prompt, response, f"data.files={files}")
    else:
        sources, template = corpora.standard_library(), template or "plain"
        how |= dict(name="functions", version=3, template=template, content=corpora.digest_all(sources))
        load = partial(functions, sources)
    return Corpus(load, how, pairs=Pairs(template, prompt_len))


# Columns


class Shape(NamedTuple):
    """Which columns hold what; without a response the prompt is a whole conversation."""

    prompt: str
    input: str | None
    response: str | None


SHAPES = (
    Shape("messages", None, None),
    Shape("instruction", "context", "response"),  # Dolly
    Shape("instruction", "input", "output"),  # Alpaca
    Shape("prompt", None, "response"),
    Shape("prompt", None, "completion"),
    Shape("question", None, "answer"),
)


def _examples(rows: Callable, prompt: str | None, response: str | None, option: str) -> Documents:
    """Examples of a `datasets` set; raises UserError, with the columns that there are, where none are known."""
    documents = Documents(rows(), lambda row: _example(row, shape, option), option)
    shape = _shape(documents.columns, prompt, response, option)
    first = documents.first()
    if shape.response is None and first and not isinstance(first[shape.prompt], list):
        raise UserError(
            f"{option}: column {shape.prompt!r} is no list of messages with role and content, so the response is "
            f"elsewhere: type data.response=ONE_OF {', '.join(documents.columns)}."
        )
    return documents


def _shape(columns: list[str], prompt: str | None, response: str | None, option: str) -> Shape:
    there = f"{option}: it has the columns {', '.join(columns)}"
    if response and not prompt:
        raise UserError(f"{there}. data.response={response} needs data.prompt=ONE_OF_THEM too.")
    for name, column in (("prompt", prompt), ("response", response)):
        if column and column not in columns:
            raise UserError(f"{there}, and no {column!r}. Type data.{name}=ONE_OF_THEM.")
    if prompt:
        return Shape(prompt, None, response)
    for shape in SHAPES:
        if shape.prompt in columns and shape.response in (None, *columns):
            return shape._replace(input=shape.input if shape.input in columns else None)
    known = "; ".join(", ".join(filter(None, shape)) for shape in SHAPES)
    raise UserError(f"{there}, which are none of the shapes that are known ({known}). Say which ones to take: "
                    "data.prompt=COLUMN data.response=COLUMN.")  # fmt: skip


def _example(row: dict, shape: Shape, option: str) -> Example:
    """A row: the last turn of the assistant is the response, what comes before it is asked."""
    turns = _turns(row, shape.prompt, "user", option)
    if shape.input:
        turns += [turn for turn in _turns(row, shape.input, "input", option) if turn[1].strip()]
    if shape.response:
        turns += _turns(row, shape.response, "assistant", option) or [("user", "")]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0 or (shape.response and last < len(turns) - 1):
        return Example((), "")
    return Example(tuple(turns[:last]), turns[last][1], isinstance(row[shape.prompt], list))


def _turns(row: dict, column: str, role: str, option: str) -> list[Turn]:
    """What a column says, as turns: text is one of `role`, a list of messages is as it is, null is none."""
    value = row[column]
    if value is None:
        return []
    if isinstance(value, str):
        return [(role, value)]
    messages = value if isinstance(value, list) else [None]
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            what = type(value).__name__ if message is None else f"a list with {_brief(message)}"
            raise UserError(
                f"{option}: column {column!r} holds {what} where it needs text, or a list of messages with role and "
                "content, both text. Name others with data.prompt= and data.response=, or leave such rows out."
            )
    return [(message["role"], message["content"]) for message in messages]


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


# Functions

MOST_ASKED, MOST_DONE = 600, 1000  # characters of a prompt and of a body; some 9 of 10 have no more


def functions(sources: Iterable[str]) -> list[Example]:
    """Functions and methods with a docstring, whose signature and docstring ask for the body, each once.

    Prompt and response together are whole lines of the source as they stand, so a model of source goes on with a
    prompt as it would anywhere. A function is on the side of the split that its file is on, so a student pre-trained on
    data=python has not read what is measured on. Functions within functions are left out, since they are part of
    another's body, and so are bodies that do nothing, or raise an error and nothing else.
    """
    found: dict[tuple[Turn, ...], Example] = {}
    for source in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes, in others' source
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # a template, or of another version of Python
        lines = source.split("\n")  # as ast counts them; splitlines() splits at form feeds too
        for function in _defined(tree):
            example = _asked_for(function, lines)
            if example:
                found.setdefault(example.turns, example._replace(document=source))
    return list(found.values())


def _defined(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _defined(child)


def _asked_for(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Example | None:
    docstring, *body = function.body
    if len((ast.get_docstring(function) or "").split()) < 3 or all(map(_idle, body)):
        return None
    first = min(node.lineno for node in (function, *function.decorator_list)) - 1
    # Behind the closing quotes, so that the response begins with the end of a line: no tokenizer joins the two.
    last = docstring.end_lineno - 1
    quoted = lines[last].encode()[: docstring.end_col_offset].decode()
    prompt = "\n".join([*lines[first:last], quoted])
    response = "\n".join([lines[last].removeprefix(quoted), *lines[last + 1 : function.end_lineno]])
    if len(prompt) > MOST_ASKED or len(response) > MOST_DONE:
        return None
    return Example((("user", prompt),), response)


def _idle(statement: ast.stmt) -> bool:
    """Whether a statement does nothing that could be asked for."""
    value = getattr(statement, "value", None)
    nothing = value is None or (isinstance(value, ast.Constant) and value.value in (None, ...))
    return isinstance(statement, ast.Pass | ast.Raise) or (isinstance(statement, ast.Expr | ast.Return) and nothing)


# Templates

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)


def alpaca(turns: Iterable[Turn]) -> str:
    """The prompt of Taori et al. 2023 (Stanford Alpaca), with the line end behind it that MiniLLM gives it.

    MiniLLM: Gu et al. 2023, arXiv 2306.08543. Further turns follow in the same form; what a system turn says stands in
    place of the first sentence.
    """
    turns, heads = list(turns), {"user": "Instruction", "assistant": "Response"}
    system = [said for role, said in turns if role == "system"]
    first = system or [ALPACA_INPUT if any(role == "input" for role, _ in turns) else ALPACA]
    parts = [f"### {heads.get(role, role.capitalize())}:\n{said}" for role, said in turns if role != "system"]
    return "\n\n".join([*first, *parts, "### Response:\n"])


def plain(turns: Iterable[Turn]) -> str:
    """Text as it is; several turns with an empty line between them."""
    return "\n\n".join(said for _, said in turns)


WRITTEN = {"alpaca": alpaca, "plain": plain}


def written(example: Example, template: str) -> str:
    """Prompt and response as one text, by a template that needs no tokenizer."""
    return WRITTEN[template](example.turns) + example.response


def template_of(pairs: Pairs, examples: Iterable[Example], tokenizer=None) -> str:
    """The name of the template that was asked for, or is usual; raises UserError for chat with a tokenizer without it.

    tokenizer: None for one that is still to be trained.
    """
    able = getattr(tokenizer, "chat_template", None) is not None
    if pairs.template == "chat" and not able:
        has = "a tokenizer that is trained on the examples has none" if tokenizer is None else "the tokenizer has none"
        raise UserError(
            f"data.template=chat: {has}. Take that of a model for chats (data.tokenizer=NAME_OR_FOLDER, or the model "
            "itself: student=hub student.name=…), or data.template=alpaca."
        )
    if pairs.template:
        return pairs.template
    first = next(iter(examples), None)
    return "chat" if able and first and first.conversation else "alpaca"


def _chat(turns: Iterable[Turn], tokenizer) -> list[int]:
    """Tokens of a prompt in the tokenizer's chat template, up to where the assistant is to speak."""
    messages: list[dict] = []
    for role, said in turns:
        if role == "input" and messages:
            messages[-1]["content"] += f"\n\n{said}"
        else:
            messages.append({"role": role, "content": said})
    # Only what the template itself says can become a special token.
    return _applied(tokenizer, messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True)


def _applied(tokenizer, messages: list[dict], **how):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError, ValueError) as error:  # templates are Hub files, and raise what they like
        raise UserError(
            f"data.template=chat: the tokenizer's chat template does not take {_brief(messages)}: {error}. Take "
            "data.template=alpaca, or leave such examples out."
        ) from error


# Tokens


def tokens(texts: list[str], tokenizer) -> list[list[int]]:
    """Tokens of plain text: none is special, whatever the text says, and none is added."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode(examples: list[Example], template: str, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Tokens of the prompt and of the response of each example, without what ends it; none where there is no prompt.

    A prompt has the tokens that it has alone, with those that the tokenizer puts in front of a text; a chat template
    writes its own. A response has those that it has behind the prompt, if none reaches over both.
    """
    if template == "chat":
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise UserError(
                "data.template=chat: this transformers takes text that looks like a special token for one, so that a "
                "prompt could end itself. Type pip install 'transformers>=5.23', or data.template=alpaca."
            )
        responses = tokens([example.response for example in examples], tokenizer)
        return [(_chat(e.turns, tokenizer) if e.turns else [], r) for e, r in zip(examples, responses, strict=True)]
    texts = [WRITTEN[template](example.turns) if example.turns else "" for example in examples]
    bos, prompts = bos_of(tokenizer), tokens(texts, tokenizer)
    wholes = tokens([text + example.response for text, example in zip(texts, examples, strict=True)], tokenizer)
    pairs = []
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        joined = whole[: len(prompt)] == prompt  # alone, a response may begin otherwise: SentencePiece adds a space
        response = whole[len(prompt) :] if joined else tokens([example.response], tokenizer)[0]
        pairs.append((bos + prompt if prompt else [], response))
    return pairs


def end_of_response(template: str, tokenizer) -> int | None:
    """The token that ends a response: the first special one that a chat template puts behind it, else a text's end."""
    if template == "chat":
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, answer, behind = _applied(tokenizer, messages, tokenize=False).rpartition("answer")
        known = tokenizer.added_tokens_decoder
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"] if answer else []:
            if token in known and known[token].special:
                return token
    return tokenizer.eos_token_id
