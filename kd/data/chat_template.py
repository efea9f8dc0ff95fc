"""Chat template of a tokenizer: the text that it renders of a conversation, and its tokens.

Packed rows are the template's output: prompt, response and end are the beginning of the rendered conversation. Text
between the generation prompt and the answer is part of the prompt, unless a token of the answer begins in it. Only text
of the template itself can become a special token.
"""

from __future__ import annotations

import datetime
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from kd.data.examples import NOTHING, Example, Turn
from kd.data.messages import CALLS, brief
from kd.data.tokenizer import tokenize
from kd.data.tool_calls import is_mangled, with_arguments_as
from kd.errors import UserError

MARK = "09182736455463728190"  # in place of an answer, to see where the template puts it


def lost_tools(template: str) -> UserError:
    needed = "another" if template == "chat" else "data.template=chat and a"
    return UserError(
        option="data.template",
        got=template,
        why=f"writes no {'such ' if template == 'chat' else ''}tools or calls of tools, and an example has some",
        hint=f"take {needed} tokenizer whose chat template writes tools (data.tokenizer=NAME_OR_FOLDER), or leave such "
        "examples out",
    )


class ChatTemplate:
    """Chat template of a tokenizer.

    date: YYYY-MM-DD, in place of today's date. Without it, a template that uses today's date is refused, since the same
    settings would make other data tomorrow. A template with random numbers is refused too. special: see encode.
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
        """Token that ends a response."""
        return self.tokenizer.convert_tokens_to_ids(self.text_end) if self.text_end else self.tokenizer.eos_token_id

    def split(self, example: Example, before: Sequence[Turn], answer: Turn) -> tuple[str, str, str]:
        """Return generation prompt, prompt and response as the template writes them, without the end.

        The prompt begins with the generation prompt. Marks are around what is not special. Raises UserError, with both
        texts, where they cannot be the beginning of the whole conversation.
        """
        extras = self._marked({"tools": list(example.tools) or None, "options": {**example.options}}, self.control)
        prompt_messages = self._marked(_messages(before), self.control)
        opening = self._rendered(prompt_messages, add_generation_prompt=True, **extras)
        if example.prompt_only:
            return opening, opening, ""
        placed = self._rendered([*prompt_messages, {"role": "assistant", "content": MARK}], **extras)
        head, mark, tail = placed.rpartition(MARK)
        if not mark or MARK in head:
            raise self._differs("does not write the answer as it is", opening, placed)
        whole = self._rendered([*prompt_messages, *self._marked(_messages([answer]), self.in_answers)], **extras)
        start = next((text for text in (head, opening) if whole.startswith(text)), None)
        if start is None or not start.startswith(opening):
            raise self._differs("begins an answer otherwise than it asks for one", opening, whole)
        if not whole.endswith(tail) or len(start) + len(tail) > len(whole):
            raise self._differs(f"ends this answer otherwise than others ({tail!r})", opening, whole)
        end_offset = tail.find(self.text_end) if self.text_end else 0
        if end_offset < 0:
            raise self._differs(f"ends this answer without {self.text_end}", opening, whole)
        return opening, start, whole[len(start) : len(whole) - len(tail) + end_offset]

    def layout(self) -> tuple[str, str, str]:
        """Return generation prompt, text before and text after the answer, of an example with {user} as its prompt."""
        messages = [{"role": "user", "content": "{user}"}]
        opening = self._on_some_day(messages, add_generation_prompt=True)
        head, _, tail = self._on_some_day([*messages, {"role": "assistant", "content": MARK}]).rpartition(MARK)
        return opening, head.removeprefix(opening), tail

    def _text_end(self) -> str | None:
        """Return the first added token that the template puts behind an answer, as text; white space is none."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
        _, mark, tail = self._on_some_day(messages).rpartition(MARK)
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        places = [(tail.find(name), -len(name), name) for name in added if mark and name in tail]
        return min(places)[2] if places else None

    def _marked(self, value, pattern: re.Pattern):
        """Return a value with marks around what looks like a token of the template, so that it stays text."""
        return value if self.special else self.utils.mark_control_tokens(value, pattern)

    def bare(self, text: str) -> str:
        """Return a text without marks."""
        return text.replace(self.utils._CONTROL_TOKEN_START, "").replace(self.utils._CONTROL_TOKEN_END, "")

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts with marks."""
        plain = iter(tokenize([text for text in texts if self.bare(text) == text], self.tokenizer, special=True))
        return [next(plain) if self.bare(text) == text else self._ids_marked(text) for text in texts]

    def ids_behind(self, text: str) -> list[int]:
        """Return the tokens of a text as it is behind another."""
        line, both = self.ids(["\n", f"\n{text}"])
        return both[len(line) :] if both[: len(line)] == line else self.ids([text])[0]

    def _ids_marked(self, text: str) -> list[int]:
        try:
            return self.utils.encode_marked_chat(self.tokenizer, text)
        except ValueError as error:
            hint = "leave such examples out, or type data.special=tokens"
            raise UserError(option="data.template", got="chat", why=error, hint=hint) from error

    def _rendered(self, messages: list[dict], tools: list | None = None, options: Mapping = NOTHING, **kwargs) -> str:
        from jinja2 import TemplateError

        try:
            template = self.utils._compile_jinja_template(self.tokenizer.get_chat_template(None, tools))
            template.globals["strftime_now"] = self._now
            template.globals["lipsum"] = template.environment.filters["random"] = _random
            render = self.tokenizer.apply_chat_template
            text = render(with_arguments_as(messages), tools=tools, tokenize=False, **kwargs, **options)
            for form in ("object", "text"):
                if not is_mangled(messages, self.bare(text)):
                    break
                text = render(with_arguments_as(messages, form), tools=tools, tokenize=False, **kwargs, **options)
            return text
        except UserError:
            raise
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:  # templates are Hub files
            raise UserError(
                option="data.template",
                got="chat",
                why=f"the tokenizer's chat template does not take {brief(messages)}: {error}",
                hint="type data.template=alpaca, or leave such examples out",
            ) from error

    def _on_some_day(
        self, messages: list[dict], tools: list | None = None, options: Mapping = NOTHING, **kwargs
    ) -> str:
        """Return a conversation without an option of its example, perhaps the date: on self.date or a fixed one."""
        date, self.date = self.date, self.date or "2000-01-01"
        try:
            return self._rendered(messages, tools, options, **kwargs)
        finally:
            self.date = date

    def _now(self, form: str) -> str:
        """Return the day that was set, in place of the clock."""
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
        """Return keys of messages and options that do not change the text; raises UserError for tools and calls."""
        messages = _messages([*before, answer])
        names = {key for message in messages for key in message} - {"role", "content"}
        if not names and not example.tools and not example.options:
            return ()
        tools, options = list(example.tools) or None, example.options
        whole, unused = self._rendered(messages, tools, options), []
        if example.tools and self._on_some_day(messages, None, options) == whole:
            raise lost_tools("chat")
        for option in options:
            other_options = {k: v for k, v in options.items() if k != option}
            if self._on_some_day(messages, tools, other_options) == whole:
                unused.append(f"chat_template_kwargs {option}")
        for key in sorted(names):
            without_key = [{k: v for k, v in message.items() if k != key} for message in messages]
            if self._on_some_day(without_key, tools, options) == whole:
                if key in CALLS:
                    raise lost_tools("chat")
                unused += [f"key {key}"] * sum(key in message for message in messages)
        return tuple(unused)

    def _differs(self, why: str, opening: str, whole: str) -> UserError:
        """Return the error with both texts, about where they begin to differ."""
        bare_opening, bare_whole = self.bare(opening), self.bare(whole)
        place = next(
            (i for i, pair in enumerate(zip_longest(bare_opening, bare_whole)) if pair[0] != pair[1]),
            len(bare_opening),
        )
        bare_opening, bare_whole = _around(bare_opening, place), _around(bare_whole, place)
        return UserError(
            option="data.template",
            got="chat",
            why=f"the tokenizer's chat template {why}, so that no row can be what it writes.\n"
            f"With the prompt alone it writes: {bare_opening!r}\nWith the answer: {bare_whole!r}",
            hint="type data.template=alpaca, take a tokenizer with another chat template (data.tokenizer=FOLDER), or "
            "leave such examples out",
        )


def _random(*args, **kwargs):
    raise UserError(
        option="data.template",
        got="chat",
        why="the tokenizer's chat template draws random text, so that the same command would make other data each time",
        hint="type data.template=alpaca, or take a tokenizer with another chat template (data.tokenizer=FOLDER)",
    )


def _messages(turns: Iterable[Turn]) -> list[dict]:
    """Return turns as chat templates take them; an input belongs to the turn before it."""
    messages: list[dict] = []
    for turn in turns:
        if turn.role == "input" and messages:
            messages[-1]["content"] += f"\n\n{turn.content}"
        else:
            messages.append({"role": turn.role, "content": turn.content, **turn.keys})
    return messages


def _around(text: str, place: int) -> str:
    """Return some 200 characters of a text about a place."""
    start, end = max(0, place - 100), place + 100
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
