"""Advantages and epochs of rollout=mixed."""

import numpy as np
import pytest
import torch

from kd.data.batches import IGNORE
from tests.cases import close
from tests.rollout.examples import build_rollout, data, same
from tests.rollout.test_generate import T, whole


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_batch_is_learned_from_in_so_many_steps(epochs, models):
    rollout = build_rollout(models, "mixed", epochs=epochs)
    batches = [rollout(data(step), step, 0.0) for step in range(6)]
    for step in range(6):
        assert batches[step].row_ids.tolist() == data(step - step % epochs).row_ids.tolist()
        same(batches[step], batches[step - step % epochs])
    assert rollout.samplers.tokens == sum((batches[step].labels != IGNORE).sum() for step in range(0, 6, epochs))


@pytest.mark.parametrize("name", ["mixed", "mixed_code"])
def test_the_advantage_is_that_of_the_paper_and_that_of_the_code(name, models):
    """Recomputed in numpy from whole forward passes of both models over what was written."""
    sampled = build_rollout(models, name)(data(prompts=[2, 7, T, 4, 5, 3, 9]), 0, 0.0)
    log_q, log_p = (whole(models[who], sampled).double().numpy() for who in ("student", "teacher"))
    counted = (sampled.labels != IGNORE).numpy()
    expected = np.zeros_like(log_q)
    for row in range(len(counted)):
        place = np.flatnonzero(counted[row])
        r = (log_p - log_q)[row, place]
        if name == "mixed":  # the mean of all that come later
            expected[row, place] = [r[t + 1 :].mean() if t + 1 < len(r) else 0 for t in range(len(r))]
            continue
        r, total = np.clip(r / 0.5, -100, 100), 0.0
        for t in reversed(range(len(r))):
            total = r[t] + 0.95 * total
            expected[row, place[t]] = total / (len(r) - t)
    if name == "mixed_code":
        values = expected[counted]
        expected[counted] = (values - values.mean()) / np.sqrt(values.var() + 1e-8)
    close(sampled.token_info.advantage.double(), expected, rtol=1e-3, atol=1e-4)
    mixture = 0.2 * np.exp(log_p) + 0.8 * np.exp(log_q)
    weight = np.where(counted, np.exp(log_q) / mixture, 0)
    close(sampled.token_info.importance.double(), weight, rtol=1e-3, atol=1e-5)


def test_rewards_are_scaled_and_then_cut(models):
    plain = dict(gamma=0.0, length_norm=False, exclude_own_reward=False)
    one = build_rollout(models, "mixed", **plain)(data(), 0, 0.0).token_info
    close(one.advantage, one.teacher_logp - one.student_logp, rtol=1e-6)
    two = build_rollout(models, "mixed", **plain, scale=0.25, clip=2.0)(data(), 0, 0.0).token_info
    close(two.advantage, (4 * (one.teacher_logp - one.student_logp)).clamp(-2, 2), rtol=1e-6)
    assert (two.advantage.abs() == 2).any() and (two.advantage.abs() < 2).any()


def test_without_a_share_of_the_teacher_the_student_writes_alone(models):
    sampled = build_rollout(models, "mixed", teacher_share=0.0)(data(), 0, 0.0)
    mask = sampled.labels != IGNORE
    close(sampled.token_info.importance[mask], torch.ones(int(mask.sum())), rtol=1e-5)
    assert sampled.token_info.teacher_logp[mask].any()
