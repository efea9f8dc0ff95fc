"""Returns by hand and beside their definition; who writes what at which step; that a resumed run writes the same."""

import io
from types import SimpleNamespace

import pytest
import torch

from kd.config.declarations import Declaration, of_group
from kd.data.batches import IGNORE, Batch
from kd.objective.token_info import TokenInfo
from kd.rollout import generate
from kd.rollout.base import Rollout
from kd.rollout.rows import only_by_student
from kd.rollout.samplers import Samplers
from kd.training.module import DistillationModule
from tests.cases import close, each, option
from tests.refusals import refused
from tests.rollout.examples import ROLLOUTS, build_rollout, data, prompts_of, same
from tests.rollout.test_generate import END, T, whole


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
