"""Models that generate text during training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError
from kd.models.causal_lm import CausalLM
from kd.rollout import generate, vllm
from kd.rollout.rows import concatenate


@dataclass
class Samplers:
    """Models that generate text, with counters of the text so far. rows: most rows at once; None for all."""

    student: CausalLM | None
    teacher: CausalLM | None
    eos_token_id: int | None  # end of a response; None for text without responses
    seed: int
    rows: int | None = None
    tokens: int = 0  # tokens written so far
    seconds: float = 0.0  # time of the writing
    tokens_read: dict[str, int] = field(default_factory=lambda: {"student": 0, "teacher": 0})  # prompts included
    engines: dict[str, vllm.Engine] = field(default_factory=dict)
    between: Callable[[], None] = lambda: None  # called before each `rows`

    def write(self, batch: Batch, *names: str, engine: str = "kd", **sampling) -> Batch:
        """Return a batch with responses of the student, the teacher, or the mixture of both.

        The draws depend on batch.position_seeds alone: the same batch gets the same responses. For another response to
        each prompt, pass batch._replace(position_seeds=batch.position_seeds + 1).
        engine: kd, or vllm if only one model writes. sampling: see kd.rollout.generate.sample.
        """
        models = {name: getattr(self, name) for name in names}
        if None in models.values():
            raise UserError(
                option="rollout",
                why="needs a teacher that writes responses, and this run has none",
                hint="type logits=online and a teacher, or rollout=none",
            )
        assert self.eos_token_id is not None, "a response ends with a token"
        start = time.perf_counter()
        salt = {"student": 1, "teacher": 2}[names[-1]] << 32  # the numbers without salt draw the teacher's samples
        if engine == "vllm":
            (name,) = names
            if name not in self.engines:
                self.engines[name] = vllm.Engine(models[name], batch.ids.shape[1], learns=name == "student")
            seed = batch.position_seeds[:, 0] ^ salt
            written = [self.engines[name].write(batch, self.eos_token_id, seed, **sampling)]
        else:
            parts = batch._replace(teacher_rows=None).split(self.rows or len(batch.ids))
            written = []
            for part in parts:
                self.between()
                seed = part.position_seeds[:, 0] ^ salt
                written.append(generate.sample(part, self.eos_token_id, seed, **models, **sampling))
        self.seconds += time.perf_counter() - start
        new = sum(int((part.labels != IGNORE).sum()) for part in written)
        self.tokens += new
        for name in names:
            self.tokens_read[name] += new + int(generate.prompt_lengths(batch).clamp(max=batch.ids.shape[1]).sum())
        return concatenate(written)

    def step_rng(self, step: int) -> np.random.Generator:
        """Return the random number generator of a step, the same on all ranks."""
        return np.random.default_rng([self.seed, step, 2])
