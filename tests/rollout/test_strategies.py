"""Returns by hand and beside their definition; who writes what at which step; that a resumed run writes the same."""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd.config.declarations import Declaration, of_group
from kd.data.batches import IGNORE, Batch
from kd.objective.token_info import TokenInfo
from kd.parallel import collectives
from kd.rollout import generate
from kd.rollout.base import Rollout
from kd.rollout.mixed import returns, whiten
from kd.rollout.rows import only_by_student
from kd.rollout.samplers import Samplers
from kd.runs.run import Run
from kd.training.callbacks.checkpoints import Checkpoints
from kd.training.module import DistillationModule
from tests.cases import close, each, option, settings
from tests.refusals import refused
from tests.rollout.test_generate import END, T, batch, model, whole

PROMPTS = [2, 7, T, 4]
ROLLOUTS = settings("rollout")


# Returns


def earned(reward: list[float], mask: list[int], gamma: float, length_norm: bool, exclude: bool) -> list[float]:
    reward, mask = torch.tensor([reward], dtype=torch.float64), torch.tensor([mask]).bool()
    return returns(reward, mask, gamma, length_norm, exclude)[0].tolist()


@pytest.mark.parametrize(
    ("reward", "mask", "gamma", "length_norm", "exclude_own_reward", "expected"),
    [
        ([1, 2, 4], [1, 1, 1], 1.0, False, False, [7, 6, 4]),
        ([1, 2, 4], [1, 1, 1], 1.0, False, True, [6, 4, 0]),
        ([1, 2, 4], [1, 1, 1], 0.5, False, False, [3, 4, 4]),
        ([1, 2, 4], [1, 1, 1], 0.5, False, True, [4, 4, 0]),
        ([1, 2, 4], [1, 1, 1], 0.5, True, False, [1, 2, 4]),
        ([1, 2, 4], [1, 1, 1], 0.5, True, True, [2, 4, 0]),
        ([1, 2, 4], [1, 1, 1], 0.0, False, False, [1, 2, 4]),
        ([1, 2, 4], [1, 1, 1], 0.0, False, True, [2, 4, 0]),
        ([9, 9, 1, 2, 4, 9, 9], [0, 0, 1, 1, 1, 0, 0], 0.5, True, False, [0, 0, 1, 2, 4, 0, 0]),
        ([9, 9, 1, 2, 4, 9, 9], [0, 0, 1, 1, 1, 0, 0], 0.5, True, True, [0, 0, 2, 4, 0, 0, 0]),
        # A gap counts as time that passes, and not as a reward: the first is told 1 + 4 / 4.
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, False, False, [2.5, 0, 6, 0, 8]),
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, True, False, [2.5 / 3, 0, 3, 0, 8]),
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, False, True, [3, 0, 4, 0, 0]),
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, True, True, [1.5, 0, 4, 0, 0]),
        ([9, -3, 9], [0, 1, 0], 0.9, True, False, [0, -3, 0]),  # a response of one token
        ([9, -3, 9], [0, 1, 0], 0.9, True, True, [0, 0, 0]),
        ([9, 9, 9], [0, 0, 0], 0.9, True, False, [0, 0, 0]),
    ],
)
def test_returns_worked_by_hand(reward, mask, gamma, length_norm, exclude_own_reward, expected):
    assert earned(reward, mask, gamma, length_norm, exclude_own_reward) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("exclude_own_reward", [False, True])
def test_returns_are_what_their_sum_says(gamma, length_norm, exclude_own_reward):
    rng = np.random.default_rng(0)
    reward, mask = rng.normal(size=(20, 11)), rng.random((20, 11)) < 0.7
    expected = np.zeros_like(reward)
    for row, t in zip(*mask.nonzero()):
        later = [s for s in range(t + exclude_own_reward, 11) if mask[row, s]]
        expected[row, t] = sum(gamma ** (s - t - exclude_own_reward) * reward[row, s] for s in later)
        expected[row, t] /= max(1, len(later)) if length_norm else 1
    actual = returns(torch.from_numpy(reward), torch.from_numpy(mask), gamma, length_norm, exclude_own_reward)
    close(actual, expected)


def test_returns_of_the_next_are_those_that_begin_here_one_further_on():
    reward = torch.randn(3, 8, dtype=torch.float64)
    every = torch.ones(3, 8).bool()
    here, after = (returns(reward, every, 0.9, True, exclude_own_reward) for exclude_own_reward in (False, True))
    close(after[:, :-1], here[:, 1:])
    assert not after[:, -1].any()


def test_rewards_that_do_not_count_change_no_return():
    mask = torch.tensor([[False, True, True, False, True, False]])
    reward = torch.randn(1, 6)
    for other in (0.0, 1e6, -1e6):
        changed = torch.where(mask, reward, other)
        assert torch.equal(returns(changed, mask, 0.9, True, True), returns(reward, mask, 0.9, True, True))


def test_returns_and_whitening_carry_no_gradient():
    reward = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3).bool()
    assert not whiten(returns(reward, mask, 1.0, True, False), mask).requires_grad


def test_whitening_worked_by_hand():
    x = torch.tensor([[1.0, 3.0, 100.0], [1.0, -50.0, 3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]), rtol=1e-6)
    x = torch.tensor([[0.0, 0.0, 6.0]])  # mean 2, variance 8
    close(whiten(x, torch.ones(1, 3)), [[-(0.5**0.5), -(0.5**0.5), 2**0.5]], rtol=1e-6)


def test_whitening_of_what_does_not_vary_is_nothing():
    assert not whiten(torch.full((2, 3), 5.0), torch.ones(2, 3)).any()
    assert not whiten(torch.randn(2, 3), torch.zeros(2, 3)).any()
    one = torch.tensor([[0, 1, 0]])
    assert not whiten(torch.randn(1, 3), one).any()


def test_whitening_is_over_all_ranks(monkeypatch):
    x, mask = torch.randn(5, 4) + 3, torch.rand(5, 4) < 0.7
    expected = whiten(x, mask)
    here, sums, whitened = threading.local(), {}, {}
    barrier = threading.Barrier(2)

    def total(value: torch.Tensor) -> torch.Tensor:
        here.count = getattr(here, "count", 0) + 1
        sums.setdefault(here.count, []).append(value)
        barrier.wait()
        return sum(sums[here.count])

    def work(rows: slice) -> None:
        whitened[rows.start] = whiten(x[rows], mask[rows])

    monkeypatch.setattr(collectives, "all_reduce_sum", total)
    threads = [threading.Thread(target=work, args=[rows]) for rows in (slice(0, 3), slice(3, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(torch.cat([whitened[0], whitened[3]]), expected, rtol=1e-6)


# Who writes


def data(step: int = 0, prompts=PROMPTS) -> Batch:
    """The batch of a step; a step has its own text and random numbers."""
    given = batch(prompts)
    generator = torch.Generator().manual_seed(step)
    seed = torch.randint(2**62, given.ids.shape, generator=generator)
    shift = step * (given.ids > 10)
    return given._replace(ids=(given.ids + shift) % 80 + 5, position_seeds=seed, row_ids=given.row_ids + 10 * step)


@pytest.fixture(scope="module")
def models():
    return {"student": model("llama", 0), "teacher": model("gpt2", 1)}


def build_rollout(models, name: str, **changes):
    return option("rollout", name, **changes)(Samplers(**models, eos_token_id=END, seed=5))


def same(a: Batch, b: Batch) -> None:
    for name in ("ids", "labels", "row_ids", "position_seeds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    one, two = ({} if x.token_info is None else x.token_info.provided() for x in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def prompts_of(batch: Batch) -> list[list[int]]:
    return [batch.ids[row, :size].tolist() for row, size in enumerate(generate.prompt_lengths(batch))]


@each("name", {name: name for name in ROLLOUTS})
def test_every_option_gives_what_it_says_for_every_batch(name, models):
    changes = {"capacity": 4, "threshold": 0.6} if name == "adaptive" else {}
    rollout = build_rollout(models, name, **changes)
    provided = {*of_group("rollout", "provides").get(name.removesuffix("_code"), Declaration()).names}
    for step in range(8):
        given = data(step)
        sampled = rollout(given, step, step / 8)
        info = {} if sampled.token_info is None else sampled.token_info[sampled.labels != IGNORE].provided()
        assert provided <= info.keys() and all(x.isfinite().all() for x in info.values())
        if name not in ("adaptive", "mixed", "mixed_code"):
            assert set(map(tuple, prompts_of(sampled))) == set(map(tuple, prompts_of(given)))
        loaded = torch.load(saved(rollout.state()), weights_only=True)
        build_rollout(models, name, **changes).load(loaded)


def saved(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@each("name", {name: name for name in ROLLOUTS})
def test_a_run_that_was_killed_writes_what_it_would_have_written(name, models):
    changes = {"capacity": 6, "threshold": 0.5} if name == "adaptive" else {}
    changes |= {"max_tokens": 3} if name != "none" else {}
    losses = [2.0, 2.2, 2.25]

    def go_on(rollout, start: int, stop: int) -> list[Batch]:
        batches = []
        for step in range(start, stop):
            batches.append(rollout(data(step), step, step / 10))
            if step % 3 == 2:
                rollout.on_validation(losses[step // 3])
        return batches

    one = build_rollout(models, name, **changes)
    whole_run = go_on(one, 0, 10)
    for cut in (1, 6):
        first = build_rollout(models, name, **changes)
        before = go_on(first, 0, cut)
        state = torch.load(saved(first.state()), weights_only=True)
        second = build_rollout(models, name, **changes)
        second.load(state)
        for a, b in zip(before + go_on(second, cut, 10), whole_run, strict=True):
            same(a, b)
        numbers = [{k: v for k, v in rollout.state().items() if isinstance(v, float)} for rollout in (one, second)]
        assert numbers[0] == numbers[1] and (name != "adaptive" or len(numbers[0]) == 2)


def test_none_leaves_the_text_as_it_is(models):
    given = data()
    assert build_rollout(models, "none")(given, 0, 0.0) is given


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_student_writes_a_share_of_the_batches(share, models, monkeypatch):
    rollout, wrote = build_rollout(models, "student", share=share), 0
    monkeypatch.setattr(
        generate,
        "sample",
        lambda part, *_, **__: part._replace(token_info=TokenInfo(by_student=part.labels * 0 + 1.0)),
    )
    for step in range(400):
        sampled = rollout(data(), step, step / 400)
        wrote += sampled.token_info.by_student.any().item()
    assert abs(wrote - 400 * share) <= 4 * (400 * share * (1 - share)) ** 0.5


def test_what_the_student_writes_is_what_generate_writes(models):
    given = data(3)
    sampled = build_rollout(models, "student", share=1.0, temperature=0.7, top_k=9, max_tokens=4)(given, 3, 0.0)
    seed = given.position_seeds[:, 0] ^ (1 << 32)
    options = dict(temperature=0.7, top_k=9, top_p=1.0, max_tokens=4)
    same(sampled, only_by_student(generate.sample(given, END, seed, models["student"], **options)))
    assert torch.equal(sampled.token_info.by_student, (sampled.labels != IGNORE).float())
    left = build_rollout(models, "student", share=0.0)(given, 3, 0.0)
    same(left, given._replace(token_info=TokenInfo(by_student=torch.zeros(4, T))))


def test_another_response_comes_of_other_seeds_alone(models):
    samplers, given = Samplers(**models, eos_token_id=END, seed=5), data(3)
    first, again = samplers.write(given, "student"), samplers.write(given, "student")
    other = samplers.write(given._replace(position_seeds=given.position_seeds + 1), "student")
    same(first, again)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.parametrize("info", [None, TokenInfo(), TokenInfo(advantage=torch.ones(4, T))])
def test_new_text_that_does_not_say_who_wrote_it_is_refused(info):
    """Language modelling would learn the student's own text."""

    class Unmarked(Rollout):
        def write(self, batch):
            return batch._replace(labels=batch.labels.clone(), token_info=info)

    step = SimpleNamespace(global_step=0, progress=0.0, rollout=Unmarked(Samplers(None, None, END, 5)))
    step._stop_if_requested = None
    with refused(option="rollout", why="Unmarked returns text without token_info.by_student", hint="Samplers.write"):
        DistillationModule.run_rollout(step, data(), 1.0)
    step.rollout = Rollout(step.rollout.samplers)
    given = data()
    assert DistillationModule.run_rollout(step, given, 1.0)[0] is given


def test_the_teacher_writes(models):
    sampled = build_rollout(models, "teacher", temperature=0.0)(data(), 0, 0.0)
    alone = generate.sample(data(), END, data().position_seeds[:, 0], teacher=models["teacher"], temperature=0.0)
    assert torch.equal(sampled.labels, alone.labels) and not sampled.token_info.by_student.any()
    close(sampled.token_info.teacher_logp, whole(models["teacher"], sampled), rtol=0, atol=1e-4)


def test_pairs_are_the_teachers_rows_and_then_the_students(models):
    given = data()
    sampled = build_rollout(models, "pairs")(given, 0, 0.0)
    assert prompts_of(sampled) == prompts_of(given) * 2 and len(sampled.ids) == 8
    assert torch.equal(sampled.row_ids, given.row_ids.repeat(2)) and torch.equal(
        sampled.position_seeds, given.position_seeds.repeat(2, 1)
    )
    counted = (sampled.labels != IGNORE).float()
    assert torch.equal(sampled.token_info.by_student, torch.cat([torch.zeros(4, T), counted[4:]]))
    assert [len(part.ids) for part in sampled.split(3)] == [3, 3, 2]
    greedy = {name: build_rollout(models, "pairs", temperature=0.0)(given, 0, 0.0) for name in models}["student"]
    for name, rows in (("teacher", slice(0, 4)), ("student", slice(4, 8))):
        alone = generate.sample(given, END, given.position_seeds[:, 0], **{name: models[name]}, temperature=0.0)
        assert torch.equal(greedy.labels[rows], alone.labels)


def test_one_model_asked_twice_would_not_write_the_same(models):
    sampled = build_rollout({"student": models["student"], "teacher": models["student"]}, "pairs")(data(), 0, 0.0)
    assert not torch.equal(sampled.labels[:4], sampled.labels[4:])


def test_rows_at_once_change_nothing(models):
    for name in ("student", "pairs", "mixed"):
        changes = {"share": 1.0} if name == "student" else {}
        make, batches = option("rollout", name, **changes), []
        for rows in (None, 1, 3):
            samplers = Samplers(**models, eos_token_id=END, seed=5, rows=rows)
            batches.append(make(samplers)(data(), 0, 0.0))
            assert samplers.tokens == (batches[-1].labels != IGNORE).sum() and samplers.seconds > 0
        for other in batches[1:]:
            assert torch.equal(other.labels, batches[0].labels)


@pytest.mark.parametrize("name", ["teacher", "pairs", "mixed", "mixed_code"])
def test_a_teacher_that_is_not_there_is_asked_for(name, models):
    with refused(option="rollout", why="needs a teacher", hint="logits=online"):
        build_rollout(models | {"teacher": None}, name)(data(), 0, 0.0)


# Adaptive


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


# Mixed


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


def test_another_number_of_ranks_goes_on_where_none_has_text_of_its_own(models):
    rollout = build_rollout(models, "adaptive", threshold=1.0, capacity=8)
    rollout.on_validation(2.5)
    before = rollout.state()
    going = SimpleNamespace(rollout=build_rollout(models, "adaptive"))
    code = {"sources": {}, "origins": {}}
    checkpoints = Checkpoints(Run("root", "run"), 1, {}, code)
    checkpoints.setup(None, going, "fit")
    state = {"code": code, "micro_batch_size": 2, "random": [None]}
    checkpoints.load_state_dict(state | {"rollout": [before, before]})
    assert going.rollout.reference == 2.5 and going.rollout.threshold == 1.0
    rollout(data(), 0, 0.0)
    with refused(option="trainer.devices", got=1, need="2 processes", hint="type trainer.devices=2"):
        checkpoints.load_state_dict(state | {"rollout": [before, rollout.state()]})


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [
        ("student", "share", [-0.1, 1.1, float("nan")]),
        ("adaptive", "threshold", [-0.1, 1.1]),
        ("adaptive", "tolerance", [-0.1]),
        ("adaptive", "capacity", [0]),
        ("adaptive", "replay", ["falling"]),
        ("mixed", "teacher_share", [-0.1, 1.1]),
        ("mixed", "scale", [0.0, -1.0]),
        ("mixed", "clip", [0.0, -1.0]),
        ("mixed", "gamma", [-0.1, 1.1]),
        ("mixed", "epochs", [0]),
        *((name, setting, values) for name in ROLLOUTS if name != "none" for setting, values in (
            ("temperature", [-1.0, float("inf"), float("nan")]), ("top_k", [0]), ("top_p", [0.0, 1.1]),
            ("max_tokens", [0]))),
    ],
)  # fmt: skip
def test_a_setting_without_meaning_is_refused_by_name_before_there_is_a_model(name, setting, values):
    for value in values:
        with refused(option=f"rollout.{setting}", got=value, need=" "):
            option("rollout", name, **{setting: value})(None)
