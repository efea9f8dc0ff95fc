"""Examples to learn from: conversations with marks on the turns that are learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # system, user, input, assistant, tool, …
    content: str
    keys: Mapping[str, Any] = NOTHING  # further keys of the message, for chat templates: tool_calls, name, …
    learned: bool = False


class Example(NamedTuple):
    """A conversation up to the last turn that is learned; a row of tokens for each turn that is learned."""

    turns: tuple[Turn, ...]
    conversation: bool = False  # from messages with roles, not from columns of text
    document: str = ""  # text that it is a part of, if it is
    tools: tuple[Any, ...] = ()  # for the chat template
    options: Mapping[str, Any] = NOTHING  # further variables of the chat template
    opening: int | None = None  # turns that decide the side of the split; None for all before the learned one
    unlearned: Mapping[str, int] = NOTHING  # reason -> assistant turns that are not learned
    unused: tuple[str, ...] = ()  # columns and keys that nothing reads
    left_out: str = ""  # the reason, if there is nothing to learn
    prompt_only: bool = False  # no response, as in data for a rollout that writes them all

    @classmethod
    def from_texts(
        cls, *turns: tuple[str, str], response: str, conversation: bool = False, document: str = ""
    ) -> Example:
        """An example of turns (role, content) and the response to them."""
        answer = Turn("assistant", response, learned=True)
        return cls((*(Turn(*turn) for turn in turns), answer), conversation, document)

    @property
    def split_text(self) -> str:
        """Text that decides the side of the split: the document, as for plain text, or the prompt without layout."""
        if self.document:
            return self.document
        opening = self.turns[:-1] if self.opening is None else self.turns[: self.opening]
        return " ".join(word for turn in opening for word in turn.content.split())

    @property
    def content(self) -> str:
        """Text that decides the place among all examples; without keys and tools the same as in earlier versions."""
        if not self.turns:
            return str(((), "", False))
        *before, answer = self.turns
        text = str((tuple((turn.role, turn.content) for turn in before), answer.content, self.conversation))
        more = [*(dict(turn.keys) for turn in self.turns if turn.keys), *self.tools]
        return f"{text}{more}" if more else text

    def rows(self) -> Iterator[tuple[tuple[Turn, ...], Turn]]:
        """Yield for each learned turn the turns before it, and the turn itself."""
        for place, turn in enumerate(self.turns):
            if turn.learned:
                yield self.turns[:place], turn
