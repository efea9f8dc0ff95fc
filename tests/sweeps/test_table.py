"""Rows, columns and reference lines of a report's table, against numbers made by hand."""

import json
import math
import re
import statistics

import pytest

from kd.evaluation.catalog import BY_NAME, LOSS
from sweeps.report.groups import SUPERVISED
from sweeps.report.table import constant_values, measured, reference_lines
from tests.sweeps.fake import TEACHER, cells


def test_numbers_of_the_table_are_those_made_by_hand(sweep):
    lm, fkl = [2.50, 2.47, 2.44], [2.36, 2.30, 2.31]
    page = sweep.losses(lm=lm, fkl=fkl).page()
    change = [a - b for a, b in zip(fkl, lm)]
    # t of 2 degrees of freedom has a closed form: p / sqrt(2 p (1 - p)) with p = 2 * 0.975 - 1
    t = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    half = t * math.sqrt(statistics.variance(change) / 3)
    spread = t * math.sqrt(statistics.variance(fkl) / 3)
    share = (sum(lm) - sum(fkl)) / (sum(lm) - 3 * TEACHER)
    left = [(c - share * (TEACHER - base)) / (TEACHER - sum(lm) / 3) for c, base in zip(change, lm)]
    about = t * math.sqrt(statistics.variance(left) / 3)
    assert cells(page, "fkl") == [
        "fkl", f"{sum(fkl) / 3:.4f} ± {spread:.4f}", f"−{-sum(change) / 3:.4f} ± {half:.4f}",
        f"{100 * share:.0f}% ± {100 * about:.0f}%", "0.400", "0.500", "0.750", "0.625", "0.032", "1:00",
    ]  # fmt: skip
    assert cells(page, SUPERVISED)[2:4] == ["baseline", "–"]
    teacher = cells(page, "teacher 1m")
    assert (teacher[1].split()[0], teacher[8]) == ("1.9000", "0.012")


def test_difference_to_the_first_is_paired_and_stands_where_rows_have_rivals(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.36, 2.30, 2.31], rkl=[2.41, 2.36, 2.37], jsd=[2.35, 2.33, 2.31])
    page = sweep.page()
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * statistics.stdev([0.05, 0.06, 0.06]) / math.sqrt(3)
    assert cells(page, "")[3] == "to the first"
    assert [cells(page, name)[3] for name in ("fkl", "rkl")] == ["first", f"+{0.17 / 3:.4f} ± {half:.4f}"]
    assert cells(page, "jsd")[3].endswith("within noise") and cells(page, SUPERVISED)[3].startswith("+0.1467 ±")
    assert "to the first" in sweep.file("md")
    lines = sweep.file("csv").splitlines()
    at = lines[0].split(",").index("to_the_first")
    assert [float(line.split(",")[at]) for line in lines[7:10]] == pytest.approx([0.05, 0.06, 0.06])
    assert "5 differences" not in page and "6 differences have intervals of 95% each" in page
    assert "16,384 in all" in page and "One teacher was used" in page


def test_columns_that_tell_nothing_are_no_columns(sweep):
    page = sweep.losses(lm=[2.5, 2.6], fkl=[2.4, 2.5]).page()
    assert "bits per byte" not in page and cells(page, "")[4:7] == ["fkl", "rkl", "acceptance"]
    groups = sweep.groups()
    metrics = measured(groups, LOSS)
    assert constant_values(groups, metrics, []) == {
        BY_NAME["ece"]: "0.032"
    }  # of the students; the teacher's is another
    assert constant_values(groups, metrics, reference_lines(groups)) == {}
    other = json.loads((sweep.root / "run-0" / "result.json").read_text()) | {"bytes_per_token": 4.0}
    (sweep.root / "run-0" / "result.json").write_text(json.dumps(other))
    assert BY_NAME["bpb"] in measured(sweep.groups(), LOSS)  # losses of two tokenizers cannot be compared


def test_a_gap_to_another_teacher_has_a_footnote(sweep):
    for source in ("online", "cotrained"):
        sweep.done("fkl", 0, 2.4, logits=source)
    page = sweep.done("lm", 0, 2.5).page()
    assert cells(page, "logits=cotrained")[4] == "17% †" and cells(page, "logits=online")[4] == "17%"
    assert "† Of the way to another teacher" in page and " † Its own" in sweep.file("md")


def test_a_teacher_has_one_row_whoever_learned_from_it(sweep):
    settings = {"teacher.steps": 300, "teacher.seed": 0}
    sweep.done("fkl", 0, 2.0, **settings).done("lm", 0, 2.5, rollout="teacher", **settings).done(
        "lm", 0, 3.0, **settings
    )
    assert len(sweep.groups()) == 3
    assert [line.label for line in reference_lines(sweep.groups())] == ["teacher 1m"]
    sweep.done("fkl", 0, 2.0, **settings | {"teacher.steps": 600})
    labels = sorted(line.label for line in reference_lines(sweep.groups()))
    assert labels == ["teacher teacher.steps=300", "teacher teacher.steps=600"]


@pytest.mark.parametrize("methods", [("fkl", "rkl"), ("fkl", "rkl", "jsd", "akl", "tvd", "skl")])
def test_as_many_differences_look_real_by_chance_as_5_percent_are(sweep, methods):
    losses = {name: [2.4 + 0.01 * number, 2.41, 2.39] for number, name in enumerate(methods)}
    *_, caveat = sweep.losses(lm=[2.5, 2.52, 2.49], **losses).report().caveats
    count, chance = re.search(r"(\d+) differences have intervals.*about ([\d.]+) would still look", caveat).groups()
    assert int(count) == 2 * len(methods) and float(chance) == pytest.approx(0.05 * int(count), rel=0.02)


def test_entropy_is_shown_where_it_is_known_and_a_run_without_teacher_has_dashes(sweep):
    page = sweep.done("lm", 0, 2.5, entropy=1.2618, **{"teacher.size": None}).page()
    assert cells(page, "entropy of the data")[1] == "1.2618"
    assert 'id="val-fkl"' not in page and 'id="val-ece"' in page


def test_students_before_training_have_a_row_for_each_of_what_they_start_from(sweep):
    pretrained = {"start": "pretrained", "student.size": None, "student.name": "a"}
    for seed, before in enumerate((4.0, 5.0)):
        sweep.done("fkl", seed, 2.0, **pretrained).began(**{"val/lm": before, "val/fkl": 0.75, "tokens": 0})
    page = sweep.done("rkl", 0, 2.1).page()
    row = cells(page, "before training")
    assert row[1].split()[0] == "4.5000" and "0.750" in row
    assert f"| before training | {row[1].split()[0]} |" in sweep.file("md")
    sweep.done("fkl", 0, 2.0, **pretrained | {"start": "sft"}).began(**{"val/lm": 3.0})
    labels = sorted(line.label for line in reference_lines(sweep.groups()))
    assert labels == ["before training start=pretrained", "before training start=sft", "teacher 1m"]


def test_students_that_begin_at_random_have_no_row_before_training(sweep):
    page = sweep.done("fkl", 0, 2.0).began().done("rkl", 0, 2.1).page()
    assert "before training" not in page


def test_numbers_of_a_table_of_responses_are_those_made_by_hand(sweep):
    lm, fkl = [0.20, 0.22, 0.24], [0.30, 0.33, 0.33]
    for seed in range(3):
        sweep.wrote("lm", seed, lm[seed], 2.0).wrote("fkl", seed, fkl[seed], 2.4)
    page = sweep.page()
    change = [a - b for a, b in zip(fkl, lm)]
    t = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    half, spread = (t * math.sqrt(statistics.variance(x) / 3) for x in (change, fkl))
    share = sum(change) / (1.5 - sum(lm))
    left = [(c - share * (0.5 - base)) / (0.5 - sum(lm) / 3) for c, base in zip(change, lm)]
    about = t * math.sqrt(statistics.variance(left) / 3)
    assert cells(page, "fkl")[1:5] == [
        f"{sum(fkl) / 3:.4f} ± {spread:.4f}", f"+{sum(change) / 3:.4f} ± {half:.4f}",
        f"{100 * share:.0f}% ± {100 * about:.0f}%", "2.400",
    ]  # fmt: skip
    assert 'class="good">+0.1000' in page and cells(page, "teacher 1m")[1].split()[0] == "0.5000"
    assert page.index("Rouge-L on held-out prompts</h2>") < page.index("Loss on held-out text</h2>")
    lines = sweep.file("csv").splitlines()
    assert float(lines[2].split(",")[lines[0].split(",").index("difference")]) == pytest.approx(0.1)


def test_the_highest_rouge_l_comes_first_whatever_the_loss(sweep):
    sweep.wrote("lm", 0, 0.2, 1.0).wrote("fkl", 0, 0.3, 3.0).wrote("rkl", 0, 0.1, 2.0)
    assert [g.label for g in sweep.groups()] == ["fkl", "SFT", "rkl"]
    page = sweep.page()
    assert '"bad"' not in page and cells(page, "rkl")[2] == "−0.1000"
