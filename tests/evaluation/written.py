"""Responses that a tiny model writes."""

from functools import cache

import torch

from kd.data.batches import Batch
from kd.evaluation import responses
from kd.evaluation.responses import Generations
from kd.rollout import generate
from tests.rollout.test_generate import END, batch, model


@cache
def written() -> tuple[Generations, Batch]:
    """Responses of several lengths to prompts of several lengths, one row of which is full."""
    prompts = [3, 1, 9, 5, 12]
    batch_written = generate.sample(batch(prompts), END, torch.arange(5), model("llama", 0))
    rows = responses.as_rows(batch_written)
    return Generations(rows["tokens"].numpy(), rows["span"].numpy()), batch_written
