"""Templates: a conversation as a prompt and the response to it, in tokens.

alpaca and plain need no tokenizer. chat is the tokenizer's own template, and what is packed is what it writes: prompt,
response and end are the beginning of the whole conversation as it renders it. What it puts between its generation
prompt and the answer is part of the prompt, unless a token of the answer begins in it. Only what the template itself
writes can become a special token.
"""

from __future__ import annotations

import copy
import datetime
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from kd.data.corpora import Pairs
from kd.data.examples import NOTHING, Example, Turn
from kd.data.tokenizer import bos_of
from kd.errors import UserError

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)


def alpaca(turns: Iterable[Turn]) -> str:
    """The prompt of Taori et al. 2023 (Stanford Alpaca), with the line end behind it that MiniLLM gives it.

    MiniLLM: Gu et al. 2023, arXiv 2306.08543. Further turns follow in the same form; a system turn takes the place of
    the first sentence.
    """
    turns, heads = list(turns), {"user": "Instruction", "assistant": "Response"}
    system = [turn.content for turn in turns if turn.role == "system"]
    first = system or [ALPACA_INPUT if any(turn.role == "input" for turn in turns) else ALPACA]
    parts = [f"### {heads.get(t.role, t.role.capitalize())}:\n{t.content}" for t in turns if t.role != "system"]
    return "\n\n".join([*first, *parts, "### Response:\n"])


def plain(turns: Iterable[Turn]) -> str:
    """Text as it is; several turns with an empty line between them."""
    return "\n\n".join(turn.content for turn in turns)


WRITTEN = {"alpaca": alpaca, "plain": plain}


def written(example: Example, template: str) -> str:
    """Prompt and response as one text, by a template that needs no tokenizer."""
    return "\n\n".join(WRITTEN[template](before) + answer.content for before, answer in example.rows())


def template_of(pairs: Pairs, examples: Iterable[Example], tokenizer=None) -> str:
    """The name of the template that was asked for, or is usual; raises UserError for chat with a tokenizer without it.

    tokenizer: None for one that is still to be trained.
    """
    able = getattr(tokenizer, "chat_template", None) is not None
    if pairs.template == "chat" and not able:
        which = "a tokenizer that is trained on the examples" if tokenizer is None else "the tokenizer"
        has = f"{which} has no chat template"
        raise UserError(
            option="data.template",
            got="chat",
            why=has,
            need="the chat template of a model for chats",
            hint="type data.tokenizer=NAME_OR_FOLDER, or the model itself: student=hub student.name=…, or "
            "data.template=alpaca",
        )
    if pairs.template:
        return pairs.template
    first = next((example for example in examples if example.turns), None)  # the first that is not left out
    return "chat" if able and first and first.conversation else "alpaca"


class Row(NamedTuple):
    """One learned turn, in tokens."""

    prompt: list[int]
    response: list[int]  # without the end
    text: str  # of the response
    unused: tuple[str, ...] = ()  # keys of messages that the template does not write


def encode(examples: Sequence[Example], template: str, tokenizer, special: bool = False, date: str | None = None):
    """Rows of each example: a list of lists.

    special: special tokens that are written out in the examples are read as tokens. date: see Chat. A prompt has the
    tokens that it has alone, with those that the tokenizer puts in front of a text; a chat template writes its own. A
    response has the tokens that it has behind the prompt, if none reaches over both; in a chat, one may reach into
    what the template puts between its generation prompt and the answer.
    """
    rows = [(example, *row) for example in examples for row in example.rows()]
    bare: Callable[[str], str]  # a text without marks
    if template == "chat":
        chat = Chat(tokenizer, special, date)
        texts, unused = [chat.split(*row) for row in rows], [chat.unused(*row) for row in rows]
        ids, alone, bare, bos = chat.ids, chat.ids_behind, chat.bare, []
    else:
        texts = [("", WRITTEN[template](before), answer.content) for _, before, answer in rows]
        unused = [_unwritten(template, *row) for row in rows]
        ids, bare = partial(tokens, tokenizer=tokenizer, special=special), str
        alone, bos = lambda text: ids([text])[0], bos_of(tokenizer)
    made = []
    prompts, wholes = ids([before for _, before, _ in texts]), ids([before + answer for _, before, answer in texts])
    for prompt, whole, (opening, before, response), keys in zip(prompts, wholes, texts, unused, strict=True):
        joined = whole[: len(prompt)] == prompt  # alone, a response may begin otherwise: SentencePiece adds a space
        if not joined and opening not in ("", before):
            asked = ids([opening])[0]
            if joined := whole[: len(asked)] == asked:
                kept = next(i for i, pair in enumerate(zip_longest(prompt, whole)) if pair[0] != pair[1])
                inserted = before.removeprefix(opening) if kept == len(asked) else tokenizer.decode(prompt[kept:])
                prompt, response = prompt[:kept], inserted + response
        answer = whole[len(prompt) :] if joined else alone(response)
        first = bos if prompt and prompt[: len(bos)] != bos else []  # it may be written out
        made.append(Row(first + prompt, answer, bare(response), keys))
    taken = iter(made)
    return [[next(taken) for _ in example.rows()] for example in examples]


def tokens(texts: list[str], tokenizer, special: bool = False) -> list[list[int]]:
    """Tokens of plain text: none is added, and unless special is true none is special, whatever the text holds."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"]


def end_of_response(template: str, tokenizer, date: str | None = None) -> int | None:
    """The token that ends a response: the first added one that a chat template puts behind it, else a text's end."""
    return Chat(tokenizer, date=date).end if template == "chat" else tokenizer.eos_token_id


def special_as_text(tokenizer, special: bool, template: str | None = None) -> Callable[[str], bool]:
    """Return a function that is true for texts with special tokens, written out, that are not read as tokens.

    They are those of the tokenizer, unless special is true, those of the chat template likewise, and what has the form
    of others: <|word|>. Other added tokens are always read as tokens.
    """
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    known = {name for name, is_special in added.items() if is_special}
    if template == "chat":
        known |= {*tokenizer._get_control_tokens(tokenizer.get_chat_template(None, None))}
    tokens = {*added} if special else {*added} - known  # as which they are read
    longest = sorted(known, key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, longest), r"<\|\w+\|>"]))
    return lambda text: any(name not in tokens for name in pattern.findall(text))


def check_date(date: str | None, template: str, tokenizer) -> None:
    """Raise UserError for a date that no template asks for."""
    if date and not (template == "chat" and "strftime_now" in str(tokenizer.chat_template)):
        asks = ", as the tokenizer's chat template does not ask for a date" if template == "chat" else ""
        why = f"would do nothing{asks}"
        raise UserError(
            option="data.date", got=date, conflict=f"data.template={template}", why=why, hint="leave data.date out"
        )


CALLS = ("tool_calls", "function_call")


def _unwritten(template: str, example: Example, before: Sequence[Turn], answer: Turn) -> tuple[str, ...]:
    """Names of the keys of messages, for a template that writes none; raises UserError for tools."""
    turns = [*before, answer]
    if example.tools or any(key in turn.keys for turn in turns for key in CALLS):
        raise _tools_are_lost(template)
    options = ["column chat_template_kwargs"] if example.options else []
    return (*options, *(f"key {key}" for turn in turns for key in turn.keys))


def _tools_are_lost(template: str) -> UserError:
    needed = "another" if template == "chat" else "data.template=chat and a"
    return UserError(
        option="data.template",
        got=template,
        why=f"writes no {'such ' if template == 'chat' else ''}tools or calls of tools, and an example has some",
        hint=f"take {needed} tokenizer whose chat template writes tools (data.tokenizer=NAME_OR_FOLDER), or leave such "
        "examples out",
    )


MARK = "09182736455463728190"  # in place of an answer, to see where the template puts it


class Chat:
    """The chat template of a tokenizer.

    date: YYYY-MM-DD, the day that a template gets which asks for today. Without one such a template is refused, since
    the same settings would make other data tomorrow; so is one that asks for random numbers. special: see encode.
    """

    def __init__(self, tokenizer, special: bool = False, date: str | None = None):
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise UserError(
                option="data.template",
                got="chat",
                why="the installed version of transformers reads text that looks like a special token as that token, "
                "so that a prompt could end itself",
                hint="type pip install 'transformers>=5.23', or data.template=alpaca",
            )
        from transformers.utils import chat_template_utils as utils

        self.tokenizer, self.date, self.special, self.utils = tokenizer, date, special, utils
        control = tokenizer._get_control_tokens(tokenizer.get_chat_template(None, None))
        self.control = utils._get_control_token_patterns(control)[0]
        self.text_end = self._text_end()
        special_ones = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        in_answers = special_ones | ({self.text_end} if self.text_end else set())
        self.in_answers = utils._get_control_token_patterns(tuple(sorted(in_answers)))[0]

    @property
    def end(self) -> int | None:
        """The token that ends a response."""
        return self.tokenizer.convert_tokens_to_ids(self.text_end) if self.text_end else self.tokenizer.eos_token_id

    def split(self, example: Example, before: Sequence[Turn], answer: Turn) -> tuple[str, str, str]:
        """Generation prompt, prompt and response as the template writes them, without the end.

        The prompt begins with the generation prompt. Marks are around what is not special. Raises UserError, with both
        texts, where they cannot be the beginning of the whole conversation.
        """
        more = self._marked({"tools": list(example.tools) or None, "options": {**example.options}}, self.control)
        asked = self._marked(_messages(before), self.control)
        opening = self._rendered(asked, add_generation_prompt=True, **more)
        if example.prompt_only:
            return opening, opening, ""
        placed = self._rendered([*asked, {"role": "assistant", "content": MARK}], **more)
        head, found, tail = placed.rpartition(MARK)
        if not found or MARK in head:
            raise self._differs("does not write the answer as it is", opening, placed)
        whole = self._rendered([*asked, *self._marked(_messages([answer]), self.in_answers)], **more)
        start = next((text for text in (head, opening) if whole.startswith(text)), None)
        if start is None or not start.startswith(opening):
            raise self._differs("begins an answer otherwise than it asks for one", opening, whole)
        if not whole.endswith(tail) or len(start) + len(tail) > len(whole):
            raise self._differs(f"ends this answer otherwise than others ({tail!r})", opening, whole)
        kept = tail.find(self.text_end) if self.text_end else 0
        if kept < 0:
            raise self._differs(f"ends this answer without {self.text_end}", opening, whole)
        return opening, start, whole[len(start) : len(whole) - len(tail) + kept]

    def layout(self) -> tuple[str, str, str]:
        """The generation prompt of an example with {user} as its prompt, what comes before the answer, and after it."""
        messages = [{"role": "user", "content": "{user}"}]
        opening = self._on_some_day(messages, add_generation_prompt=True)
        head, _, tail = self._on_some_day([*messages, {"role": "assistant", "content": MARK}]).rpartition(MARK)
        return opening, head.removeprefix(opening), tail

    def _text_end(self) -> str | None:
        """The first added token that the template puts behind an answer, as text; white space is none."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
        _, found, tail = self._on_some_day(messages).rpartition(MARK)
        known = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        places = [(tail.find(name), -len(name), name) for name in known if found and name in tail]
        return min(places)[2] if places else None

    def _marked(self, value, pattern: re.Pattern):
        """A value with marks around what looks like a token of the template, so that it stays text."""
        return value if self.special else self.utils.mark_control_tokens(value, pattern)

    def bare(self, text: str) -> str:
        """A text without marks."""
        return text.replace(self.utils._CONTROL_TOKEN_START, "").replace(self.utils._CONTROL_TOKEN_END, "")

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts with marks."""
        plain = iter(tokens([text for text in texts if self.bare(text) == text], self.tokenizer, special=True))
        return [next(plain) if self.bare(text) == text else self._ids_marked(text) for text in texts]

    def ids_behind(self, text: str) -> list[int]:
        """Tokens of a text as it is behind another."""
        line, both = self.ids(["\n", f"\n{text}"])
        return both[len(line) :] if both[: len(line)] == line else self.ids([text])[0]

    def _ids_marked(self, text: str) -> list[int]:
        try:
            return self.utils.encode_marked_chat(self.tokenizer, text)
        except ValueError as error:
            hint = "leave such examples out, or type data.special=tokens"
            raise UserError(option="data.template", got="chat", why=error, hint=hint) from error

    def _rendered(self, messages: list[dict], tools: list | None = None, options: Mapping = NOTHING, **how) -> str:
        from jinja2 import TemplateError

        try:
            template = self.utils._compile_jinja_template(self.tokenizer.get_chat_template(None, tools))
            template.globals["strftime_now"] = self._now
            template.globals["lipsum"] = template.environment.filters["random"] = _random
            render = self.tokenizer.apply_chat_template
            text = render(_calls(messages), tools=tools, tokenize=False, **how, **options)
            for form in ("object", "text"):
                if not _is_mangled(messages, self.bare(text)):
                    break
                text = render(_calls(messages, form), tools=tools, tokenize=False, **how, **options)
            return text
        except UserError:
            raise
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:  # templates are Hub files
            raise UserError(
                option="data.template",
                got="chat",
                why=f"the tokenizer's chat template does not take {_brief(messages)}: {error}",
                hint="type data.template=alpaca, or leave such examples out",
            ) from error

    def _on_some_day(self, messages: list[dict], tools: list | None = None, options: Mapping = NOTHING, **how) -> str:
        """A conversation without an option of its example, which may be the date: on that of Chat, or a fixed one."""
        date, self.date = self.date, self.date or "2000-01-01"
        try:
            return self._rendered(messages, tools, options, **how)
        finally:
            self.date = date

    def _now(self, form: str) -> str:
        """The day that was set, in place of the clock."""
        if self.date is None:
            raise UserError(
                option="data.template",
                got="chat",
                why="the tokenizer's chat template writes today's date into every prompt, so that the same command "
                "would make other data tomorrow",
                hint=f"choose the day: type e.g. data.date={datetime.date.today()}",
            )
        return datetime.datetime.fromisoformat(self.date).strftime(form)

    def unused(self, example: Example, before: Sequence[Turn], answer: Turn) -> tuple[str, ...]:
        """Keys of messages and options that change nothing of the text; raises UserError for tools and their calls."""
        messages = _messages([*before, answer])
        names = {key for message in messages for key in message} - {"role", "content"}
        if not names and not example.tools and not example.options:
            return ()
        tools, options = list(example.tools) or None, example.options
        whole, unused = self._rendered(messages, tools, options), []
        if example.tools and self._on_some_day(messages, None, options) == whole:
            raise _tools_are_lost("chat")
        for option in options:
            other_options = {k: v for k, v in options.items() if k != option}
            if self._on_some_day(messages, tools, other_options) == whole:
                unused.append(f"chat_template_kwargs {option}")
        for key in sorted(names):
            less = [{k: v for k, v in message.items() if k != key} for message in messages]
            if self._on_some_day(less, tools, options) == whole:
                if key in CALLS:
                    raise _tools_are_lost("chat")
                unused += [f"key {key}"] * sum(key in message for message in messages)
        return tuple(unused)

    def _differs(self, why: str, opening: str, whole: str) -> UserError:
        """The error with both texts, about where they begin to differ."""
        alone, both = self.bare(opening), self.bare(whole)
        place = next((i for i, pair in enumerate(zip_longest(alone, both)) if pair[0] != pair[1]), len(alone))
        alone, both = _around(alone, place), _around(both, place)
        return UserError(
            option="data.template",
            got="chat",
            why=f"the tokenizer's chat template {why}, so that no row can be what it writes.\n"
            f"With the prompt alone it writes: {alone!r}\nWith the answer: {both!r}",
            hint="type data.template=alpaca, take a tokenizer with another chat template (data.tokenizer=FOLDER), or "
            "leave such examples out",
        )


def _random(*args, **how):
    raise UserError(
        option="data.template",
        got="chat",
        why="the tokenizer's chat template draws random text, so that the same command would make other data each time",
        hint="type data.template=alpaca, or take a tokenizer with another chat template (data.tokenizer=FOLDER)",
    )


def _messages(turns: Iterable[Turn]) -> list[dict]:
    """Turns as chat templates take them; an input belongs to the turn before it."""
    messages: list[dict] = []
    for turn in turns:
        if turn.role == "input" and messages:
            messages[-1]["content"] += f"\n\n{turn.content}"
        else:
            messages.append({"role": turn.role, "content": turn.content, **turn.keys})
    return messages


def _arguments(messages: list[dict]) -> Iterator[tuple[dict, object]]:
    """Each call of a tool that has arguments, and these."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in [*(calls if isinstance(calls, list) else []), message]:
            function = (call.get("function", call) if call is not message else call.get("function_call")) or {}
            if isinstance(function, dict) and "arguments" in function:
                yield function, function["arguments"]


def _calls(messages: list[dict], form: str | None = None) -> list[dict]:
    """Messages with the arguments of calls as an object or as JSON text, which templates expect one or the other."""
    if form is None:
        return messages
    messages = copy.deepcopy(messages)
    for function, arguments in _arguments(messages):
        try:
            if form == "object" and isinstance(arguments, str):
                function["arguments"] = json.loads(arguments)
            elif form == "text" and not isinstance(arguments, str):
                function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        except ValueError:
            continue  # no JSON: as it stands
    return messages


def _is_mangled(messages: list[dict], text: str) -> bool:
    """True where the arguments of a call are in a text as a quoted string, or as Python writes an object."""
    for _, arguments in _arguments(messages):
        if isinstance(arguments, str):
            quoted = json.dumps(arguments, ensure_ascii=False)
            try:
                arguments = json.loads(arguments)
            except ValueError:
                continue
            if isinstance(arguments, dict | list) and quoted in text:
                return True
        if arguments and isinstance(arguments, dict):
            name = next(iter(arguments))
            if f'\\"{name}\\"' in text or f"{{'{name}'" in text:
                return True
    return False


def _around(text: str, place: int) -> str:
    """Some 200 characters of a text about a place."""
    start, end = max(0, place - 100), place + 100
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
