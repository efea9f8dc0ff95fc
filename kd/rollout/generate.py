"""Sampling of responses from a student, a teacher or a mixture of both, with a cache of keys and values.

The tokens of a row depend only on the row, its seed and the weights. The other rows of the batch and their order have
no influence, except by rounding. q is the student and p the teacher, here as everywhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers import DynamicCache

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError
from kd.models.causal_lm import CausalLM
from kd.objective.chunked import log_probabilities
from kd.objective.token_info import TokenInfo
from kd.objective.truncation import inverse_cdf_sample, nucleus, uniform
from kd.parallel import collectives


@torch.no_grad()
def sample(
    batch: Batch, end: int, seed: Tensor, student: CausalLM | None = None, teacher: CausalLM | None = None,
    share: float = 0.0, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, watch: Callable[[int, int], None] = lambda done, tokens: None,
) -> Batch:  # fmt: skip
    """Return the batch with new responses to its prompts, and with `token_info` of their tokens (0 elsewhere).

    A prompt is the part of a row before its first target token. A row without target tokens stays as it is. A response
    ends with the token `end`, after `max_tokens`, or when the row has T + 1 tokens. Those T + 1 tokens become ids and
    labels [B, T]. The tokens of a response are targets, `end` among them; the padding after it is not.

    Tokens are drawn from p~ = share * p + (1 - share) * q, or from the only model if one is given. p~ is softened by
    `temperature` (0: always the most probable token), then cut to top_k tokens, then to the top_p of the probability
    that these have. seed [B]: seed of the draws of each row.

    Computes no gradient. Models run in eval mode and get their previous mode back. `watch` is called after each step
    with the number of finished rows and the number of tokens so far. Raises UserError for a model whose
    log-probabilities change if it reads a text in parts.
    """
    length = batch.ids.shape[1]
    prompt, tokens = prompts(batch, end)
    room = (length + 1 - prompt).clamp(0, max_tokens)  # [B] largest number of new tokens
    labels, points = torch.full_like(batch.labels, IGNORE), uniform(seed, length)  # [B, T]
    names = (*(("student_logp", "importance") if student else ()), *(("teacher_logp",) if teacher else ()))
    values = {name: torch.zeros(labels.shape, device=labels.device) for name in names}
    rows, count = (room > 0).nonzero()[:, 0], 0  # [b] unfinished rows, and the number of new tokens in each
    written = 0
    with _reading(student, teacher, length) as readers:
        ids, positions, mask = _left_padded(tokens[rows], prompt[rows])
        while any_rows_left(len(rows), readers):
            logps = {name: reader(ids, positions, mask) for name, reader in readers.items()}
            choice = _softened(_mixture(list(logps.values()), share), temperature, top_k, top_p)  # [b, V]
            at = prompt[rows] + count - 1  # [b] position of the new token in labels
            token = inverse_cdf_sample(choice.exp(), points[rows, at][:, None])  # [b, 1]
            if student:
                values["importance"][rows, at] = (logps["student"] - choice).gather(-1, token)[:, 0].exp()
            for name, logp in logps.items():
                values[f"{name}_logp"][rows, at] = logp.gather(-1, token)[:, 0]
            tokens[rows, at + 1] = labels[rows, at] = token[:, 0]
            count += 1
            unfinished = ((token[:, 0] != end) & (count < room[rows])).nonzero()[:, 0]
            for reader in readers.values():
                reader.keep(unfinished)
            rows, ids, positions = rows[unfinished], token[unfinished], at[unfinished, None] + 1
            mask = functional.pad(mask[unfinished], (0, 1), value=True)
            written += len(token)
            watch(len(room) - len(rows), written)
    info = TokenInfo(**values, by_student=(labels != IGNORE).float() * (student is not None))
    return batch._replace(ids=tokens[:, :-1].contiguous(), labels=labels, teacher_rows=None, token_info=info)


def prompts(batch: Batch, end: int) -> tuple[Tensor, Tensor]:
    """Return the number of prompt tokens of each row [B], and the rows [B, T+1] with `end` at all later positions."""
    prompt, place = prompt_lengths(batch), torch.arange(batch.ids.shape[1] + 1, device=batch.ids.device)
    return prompt, functional.pad(batch.ids, (0, 1), value=end).masked_fill(place >= prompt[:, None], end)


def prompt_lengths(batch: Batch) -> Tensor:
    """Return the number of prompt tokens of each row [B]: all before the first target token, T + 1 if it has none."""
    counted = batch.labels != IGNORE
    return torch.where(counted.any(-1), counted.int().argmax(-1) + 1, counted.shape[1] + 1)


class CachedDecoder:
    """Model that reads rows piece by piece, and caches the keys and values of what it has read."""

    def __init__(self, model: CausalLM):
        self.model, self.rows = model, 0
        self.takes = inspect.signature(model.model.base_model.forward).parameters
        self.cache = DynamicCache(config=model.model.config)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return log-probabilities [b, V] of the tokens after ids [b, t].

        mask [b, all tokens read so far] is False at padding.
        """
        self.rows = len(ids)
        if not self.rows:  # this rank has finished; others still need its shards
            ids, positions, mask = (x.new_zeros(1, 1) for x in (ids, positions, mask))
            self.cache = DynamicCache(config=self.model.model.config)
        given = {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        if "position_ids" in self.takes:  # models without position_ids count by the mask
            given["position_ids"] = positions
        return log_probabilities(self.model.head, self.model.hidden_states(ids, **given)[: self.rows, -1])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        if len(rows) < self.rows:
            self.cache.reorder_cache(rows)


@contextmanager
def _reading(student: CausalLM | None, teacher: CausalLM | None, length: int) -> Iterator[dict[str, CachedDecoder]]:
    """Yield a decoder of each model that is given, with the models in eval mode for the duration of the block."""
    models = {name: model for name, model in (("student", student), ("teacher", teacher)) if model}
    with eval_mode(*models.values()):
        for model in models.values():
            check(model, length)
        yield {name: CachedDecoder(model) for name, model in models.items()}


@contextmanager
def eval_mode(*models: CausalLM) -> Iterator[None]:
    """Put models in eval mode for the duration of the block, within a training step."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiled code would be compiled again for every length
            yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)
        torch.clear_autocast_cache()  # it holds weights cast without gradient, which the training step would use


_checked: WeakSet[CausalLM] = WeakSet()


def check(model: CausalLM, length: int) -> None:
    """Raise UserError unless reading a text in parts gives the log-probabilities of reading it at once.

    The model has to be in eval mode. Two texts are tried: one has `length` tokens, the other half as many, after
    padding. All but the last few tokens are read at once, then these one by one. Each model is checked once.
    """
    if model in _checked:
        return
    weight = next(model.parameters())
    text = torch.arange(length, device=weight.device)[None] % model.head.vocab
    size = torch.tensor([length, (length + 1) // 2], device=text.device)
    ids, positions, mask = _left_padded(text.expand(2, -1), size)
    with torch.autocast(weight.device.type, enabled=False):
        whole = log_probabilities(model.head, model.hidden_states(text)[0, size - 1])  # [2, V]
        check_cache(model)
        reader, start = CachedDecoder(model), 0
        for end in range(length - min(3, int(size[1]) - 1), length + 1):
            parts = reader(ids[:, start:end], positions[:, start:end], mask[:, :end])
            start = end
    spread = whole.amax() - whole.amin()
    off = ((whole - parts).abs().max() / spread.clamp(min=1e-6)).item()
    if not off < (1e-3 if weight.dtype == torch.float32 else 0.1):
        raise _unreadable(model, f"its log-probabilities are then off by {off:.1%}")
    _checked.add(model)


def check_cache(model: CausalLM) -> None:
    """Raise UserError for a model that caches no keys and values, such as a state-space model."""
    if "past_key_values" not in inspect.signature(model.model.base_model.forward).parameters:
        raise _unreadable(model, "it has no past_key_values")


def _unreadable(model: CausalLM, why: str) -> UserError:
    return UserError(
        f"{type(model.model).__name__} cannot read a text piece by piece as kd does it, with a cache and padding on "
        f"the left: {why}. So this model cannot write responses",
        hint="choose another model, or plain text (data=text) without a rollout",
    )


def _left_padded(tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `size` [b] of tokens [b, .], their positions, and the mask without padding.

    All three are [b, largest size], with padding on the left.
    """
    widest = int(size.max()) if len(size) else 0
    positions = torch.arange(widest, device=size.device) - (widest - size)[:, None]
    mask, positions = positions >= 0, positions.clamp(min=0)
    return tokens.gather(-1, positions), positions, mask


def any_rows_left(rows: int, readers: dict[str, CachedDecoder]) -> bool:
    """Return True if there are unfinished rows here, or for a sharded model on any rank."""
    together = any(isinstance(reader.model, FSDPModule) for reader in readers.values())
    return collectives.any_rank(rows > 0) if together else rows > 0


def _mixture(logps: list[Tensor], share: float) -> Tensor:
    """Return log(share * p + (1 - share) * q), given log-probabilities [q, p], or those of the only model."""
    q, p = logps[0], logps[-1]
    if len(logps) == 1 or share == 0:
        return q
    return p if share == 1 else torch.logaddexp(p + math.log(share), q + math.log1p(-share))


def _softened(logp: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Return the log-probabilities [b, V] that tokens are drawn from."""
    if temperature == 0:
        return torch.full_like(logp, -math.inf).scatter(-1, logp.argmax(-1, keepdim=True), 0.0)
    if temperature != 1:
        logp = (logp / temperature).log_softmax(-1)
    if top_k is not None and top_k < logp.shape[-1]:
        logp = logp.masked_fill(logp < logp.topk(top_k).values[:, -1:], -math.inf).log_softmax(-1)
    if top_p < 1:
        ordered, column = logp.sort(descending=True)
        logp = torch.full_like(logp, -math.inf).scatter(-1, column, nucleus(ordered, top_p)).log_softmax(-1)
    return logp
