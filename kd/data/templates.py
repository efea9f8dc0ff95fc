"""Templates: a conversation as a prompt and the response to it, in tokens.

alpaca and plain need no tokenizer. chat is the tokenizer's own template (kd/data/chat_template.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from kd.data.chat_template import ChatTemplate, lost_tools
from kd.data.corpora import Pairs
from kd.data.examples import Example, Turn
from kd.data.messages import CALLS
from kd.data.tokenizer import bos_of, tokenize
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
    """Return prompt and response as one text, by a template that needs no tokenizer."""
    return "\n\n".join(WRITTEN[template](before) + answer.content for before, answer in example.rows())


def template_of(pairs: Pairs, examples: Iterable[Example], tokenizer=None) -> str:
    """Return the name of the chosen or default template; raise UserError for chat if the tokenizer has no template.

    tokenizer: None for one that is still to be trained.
    """
    has_chat_template = getattr(tokenizer, "chat_template", None) is not None
    if pairs.template == "chat" and not has_chat_template:
        described = "a tokenizer that is trained on the examples" if tokenizer is None else "the tokenizer"
        has = f"{described} has no chat template"
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
    return "chat" if has_chat_template and first and first.conversation else "alpaca"


class Row(NamedTuple):
    """One learned turn, in tokens."""

    prompt: list[int]
    response: list[int]  # without the end
    text: str  # of the response
    unused: tuple[str, ...] = ()  # keys of messages that the template does not write


def encode(examples: Sequence[Example], template: str, tokenizer, special: bool = False, date: str | None = None):
    """Return the rows of each example: a list of lists.

    special: special tokens that are written out in the examples are read as tokens. date: see ChatTemplate. A prompt
    has the tokens that it has alone, with those that the tokenizer puts in front of a text; a chat template writes its
    own. A response has the tokens that it has behind the prompt, if none reaches over both; in a chat, one may reach
    into what the template puts between its generation prompt and the answer.
    """
    rows = [(example, *row) for example in examples for row in example.rows()]
    bare: Callable[[str], str]  # a text without marks
    if template == "chat":
        chat = ChatTemplate(tokenizer, special, date)
        texts, unused = [chat.split(*row) for row in rows], [chat.unused(*row) for row in rows]
        ids, encode_alone, bare, bos = chat.ids, chat.ids_behind, chat.bare, []
    else:
        texts = [("", WRITTEN[template](before), answer.content) for _, before, answer in rows]
        unused = [_unwritten(template, *row) for row in rows]
        ids, bare = partial(tokenize, tokenizer=tokenizer, special=special), str
        encode_alone, bos = lambda text: ids([text])[0], bos_of(tokenizer)
    encoded = []
    prompts, wholes = ids([before for _, before, _ in texts]), ids([before + answer for _, before, answer in texts])
    for prompt, whole, (opening, before, response), keys in zip(prompts, wholes, texts, unused, strict=True):
        joined = whole[: len(prompt)] == prompt  # alone, a response may begin otherwise: SentencePiece adds a space
        if not joined and opening not in ("", before):
            opening_ids = ids([opening])[0]
            if joined := whole[: len(opening_ids)] == opening_ids:
                common = next(i for i, pair in enumerate(zip_longest(prompt, whole)) if pair[0] != pair[1])
                whole_opening = common == len(opening_ids)
                inserted = before.removeprefix(opening) if whole_opening else tokenizer.decode(prompt[common:])
                prompt, response = prompt[:common], inserted + response
        answer = whole[len(prompt) :] if joined else encode_alone(response)
        first = bos if prompt and prompt[: len(bos)] != bos else []  # it may be written out
        encoded.append(Row(first + prompt, answer, bare(response), keys))
    taken = iter(encoded)
    return [[next(taken) for _ in example.rows()] for example in examples]


def end_of_response(template: str, tokenizer, date: str | None = None) -> int | None:
    """Return the token that ends a response: the first added one that a chat template puts there, or a text's end."""
    return ChatTemplate(tokenizer, date=date).end if template == "chat" else tokenizer.eos_token_id


def special_as_text(tokenizer, special: bool, template: str | None = None) -> Callable[[str], bool]:
    """Return a function that is true for texts with written-out special tokens that stay text.

    These are the special tokens of the tokenizer and of the chat template, unless special is true, and other words of
    the form <|word|>. Other added tokens are always read as tokens.
    """
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    special_tokens = {name for name, is_special in added.items() if is_special}
    if template == "chat":
        special_tokens |= {*tokenizer._get_control_tokens(tokenizer.get_chat_template(None, None))}
    tokens = {*added} if special else {*added} - special_tokens  # as which they are read
    longest = sorted(special_tokens, key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, longest), r"<\|\w+\|>"]))
    return lambda text: any(name not in tokens for name in pattern.findall(text))


def check_date(date: str | None, template: str, tokenizer) -> None:
    """Raise UserError for a date that no template asks for."""
    if date and not (template == "chat" and "strftime_now" in str(tokenizer.chat_template)):
        reason = ", as the tokenizer's chat template does not ask for a date" if template == "chat" else ""
        why = f"would do nothing{reason}"
        raise UserError(
            option="data.date", got=date, conflict=f"data.template={template}", why=why, hint="leave data.date out"
        )


def _unwritten(template: str, example: Example, before: Sequence[Turn], answer: Turn) -> tuple[str, ...]:
    """Return the names of the keys of messages, for a template that writes none; raises UserError for tools."""
    turns = [*before, answer]
    if example.tools or any(key in turn.keys for turn in turns for key in CALLS):
        raise lost_tools(template)
    options = ["column chat_template_kwargs"] if example.options else []
    return (*options, *(f"key {key}" for turn in turns for key in turn.keys))
