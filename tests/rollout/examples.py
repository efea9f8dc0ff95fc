"""Prompts, and rollouts of every option."""

import torch

from kd.data.batches import Batch
from kd.rollout import generate
from kd.rollout.samplers import Samplers
from tests.cases import option, settings
from tests.rollout.test_generate import END, T, batch

PROMPTS = [2, 7, T, 4]
ROLLOUTS = settings("rollout")


# Who writes


def data(step: int = 0, prompts=PROMPTS) -> Batch:
    """The batch of a step; a step has its own text and random numbers."""
    given = batch(prompts)
    generator = torch.Generator().manual_seed(step)
    seed = torch.randint(2**62, given.ids.shape, generator=generator)
    shift = step * (given.ids > 10)
    return given._replace(ids=(given.ids + shift) % 80 + 5, position_seeds=seed, row_ids=given.row_ids + 10 * step)


def build_rollout(models, name: str, **changes):
    return option("rollout", name, **changes)(Samplers(**models, eos_token_id=END, seed=5))


def same(a: Batch, b: Batch) -> None:
    for name in ("ids", "labels", "row_ids", "position_seeds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    one, two = ({} if x.token_info is None else x.token_info.provided() for x in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def prompts_of(batch: Batch) -> list[list[int]]:
    return [batch.ids[row, :size].tolist() for row, size in enumerate(generate.prompt_lengths(batch))]
