"""The replay buffer of rollout=adaptive."""

import pytest
import torch

from kd.data.batches import IGNORE
from kd.objective.token_info import TokenInfo
from kd.parallel import collectives
from kd.rollout import generate
from kd.runs.run import Run
from kd.training.callbacks.checkpoints import Checkpoints
from tests.refusals import refused
from tests.rollout.examples import build_rollout, data


def test_the_threshold_rises_as_in_the_authors_code(models):
    rollout = build_rollout(models, "adaptive", tolerance=0.1)
    seen = []
    for loss in (2.0, 2.05, 1.5, 2.1, 2.15, 2.25, 1.0, 2.35, *[9.0 + n for n in range(12)]):
        rollout.on_validation(loss)
        seen.append(round(rollout.threshold, 6))
    # The loss to beat stays at 2.0 until 2.1 is there, then at 2.1 until 2.25, and so on; never below.
    assert seen[:8] == [0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.3] and seen[-1] == 1.0 and seen[-6] == 1.0


def sources(models, monkeypatch, progress: float, replay: str, threshold: float = 0.5, full: bool = True) -> dict:
    """Return the number of data, new and replayed texts in 600 steps."""
    wrote = []

    def write(part, *_, **__):
        wrote.append(1)
        return part._replace(token_info=TokenInfo(by_student=part.labels * 0 + 1.0))

    monkeypatch.setattr(generate, "sample", write)
    rollout = build_rollout(models, "adaptive", threshold=threshold, capacity=4 if full else 10**6, replay=replay)
    count = {"data": 0, "new": 0, "replayed": 0}
    for step in range(600):
        before = len(wrote)
        sampled = rollout(data(), step, progress)
        new = len(wrote) > before
        count["new" if new else "replayed" if sampled.token_info.by_student.any() else "data"] += 1
    return count


@pytest.mark.parametrize(
    ("replay", "progress", "share"),
    [("decreasing", 0.2, 0.8), ("decreasing", 0.9, 0.1), ("increasing", 0.2, 0.2), ("constant", 0.9, 0.5),
     ("decreasing", 0.0, 1.0), ("increasing", 1.0, 1.0)],
)  # fmt: skip
def test_text_is_data_new_or_replayed_as_often_as_it_should_be(replay, progress, share, models, monkeypatch):
    count = sources(models, monkeypatch, progress, replay)
    for kind, chance in (("data", 0.5), ("new", 0.5 * share), ("replayed", 0.5 * (1 - share))):
        assert abs(count[kind] - 600 * chance) <= 4 * (600 * chance * (1 - chance)) ** 0.5 + 1, kind


def test_nothing_is_replayed_before_there_is_enough(models, monkeypatch):
    count = sources(models, monkeypatch, 0.9, "decreasing", full=False)
    assert count["replayed"] == 0 and count["new"] > 200


def test_rows_are_replayed_as_they_were_written(models):
    """Run at threshold 1 and progress 1: text is generated until the buffer is full, then replayed."""
    rollout, written = build_rollout(models, "adaptive", threshold=1.0, capacity=10, max_tokens=6), {}
    for step in range(12):
        sampled = rollout(data(step), step, 1.0)
        rows = {
            int(row): (ids, labels)
            for row, ids, labels in zip(sampled.row_ids, sampled.ids.tolist(), sampled.labels.tolist(), strict=True)
        }
        if step < 3:
            assert rows.keys() == set(data(step).row_ids.tolist())
            written |= rows
            continue
        assert len(rows) == 4  # no row twice
        assert all(written[row] == rows[row] for row in rows)
        assert min(rows) >= 2  # twelve were written, and the last ten are kept
        assert torch.equal(sampled.token_info.by_student, (sampled.labels != IGNORE).float())
        assert torch.equal(sampled.position_seeds, data(step).position_seeds)
    assert any(labels[-1] == IGNORE for _, labels in written.values())  # before the row is full
    assert all(x.dtype == torch.int32 and len(x) == 10 for x in rollout.state()["rows"].values())


def test_ranks_replay_only_when_all_have_enough(models, monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    rollout = build_rollout(models, "adaptive", threshold=1.0, capacity=8)
    monkeypatch.setattr(collectives, "any_rank", lambda here: here)
    rollout(data(0), 0, 1.0)
    assert len(rollout.rows["row"]) == 4  # its part of the capacity
    monkeypatch.setattr(collectives, "any_rank", lambda here: True)  # another one has not
    assert set(rollout(data(1), 1, 1.0).row_ids.tolist()) == set(data(1).row_ids.tolist())
    monkeypatch.setattr(collectives, "any_rank", lambda here: here)
    assert set(rollout(data(2), 2, 1.0).row_ids.tolist()) == set(data(1).row_ids.tolist())


def test_another_number_of_ranks_goes_on_where_none_has_text_of_its_own(models):
    rollout = build_rollout(models, "adaptive", threshold=1.0, capacity=8)
    rollout.on_validation(2.5)
    before = rollout.state()
    going = torch.nn.Module()  # without weights that an adapter would freeze
    going.rollout = build_rollout(models, "adaptive")
    code = {"sources": {}, "origins": {}}
    checkpoints = Checkpoints(Run("root", "run"), 1, {}, code)
    checkpoints.setup(None, going, "fit")
    state = {"code": code, "micro_batch_size": 2, "random": [None]}
    checkpoints.load_state_dict(state | {"rollout": [before, before]})
    assert going.rollout.reference == 2.5 and going.rollout.threshold == 1.0
    rollout(data(), 0, 0.0)
    with refused(option="trainer.devices", got=1, need="2 processes", hint="type trainer.devices=2"):
        checkpoints.load_state_dict(state | {"rollout": [before, rollout.state()]})
