"""The report of a sweep: its numbers by hand, its words honest, nothing in it that a file could inject."""

import json
import math
import re
import socket
import statistics

import pytest
from plotly.offline import get_plotlyjs

from kd.errors import UserError
from sweeps import compare, report, space, table
from sweeps.finding import finding
from sweeps.samples import samples
from sweeps.table import rows

CONFIG = {
    "seed": 0, "root": "runs", "sweep": None, "logger": "none", "data": "python", "data.seq_len": 256,
    "data.val_rows": 64, "data.tokens": None, "teacher.size": "1m", "teacher.name": None, "teacher.steps": 600,
    "student.size": "200k", "student.name": None, "logits": "online", "temperature": "fixed", "temperature.tau": 1.0,
    "loss": "fkl", "alpha": "constant", "alpha.peak": 0.9, "trainer.steps": 300, "trainer.batch": 16,
}  # fmt: skip
PARTS = {"akl": {"loss.mu": 0.5}, "jsd": {"loss.beta": 0.5}}
TEACHER = 1.9


class Sweep:
    """Run folders as train.py leaves them."""

    def __init__(self, root, name="s"):
        self.root, self.name, self.runs = root, name, []

    def done(self, method, seed, loss, git="abc", entropy=None, **config):
        """A finished run with this loss on held-out text; method lm is language modelling alone."""
        of = {"logits": "none"} if method == "lm" else {"loss": method} | PARTS.get(method, {})
        config = CONFIG | of | {"seed": seed} | config
        far = 0.1 if method == "lm" else 0.0
        final = {
            "val/lm": loss, "val/bpb": loss / math.log(2) / 3, "val/fkl": 0.4 + far, "val/rkl": 0.5 + far,
            "val/tvd": 0.25 + far, "val/agreement": 0.625 - far, "val/ece": 0.0321,
            "val/teacher_lm": TEACHER, "val/teacher_ece": 0.0123,
        }  # fmt: skip
        if config["teacher.size"] is None:
            final = {k: final[k] for k in ("val/lm", "val/bpb", "val/ece")}
        result = {
            "state": "done", "config": config, "final": final, "environment": {"git": git, "torch": "2"},
            "parameters": 418_272, "teacher_parameters": 1_278_912, "bytes_per_token": 3.0, "entropy": entropy,
            "tokens": 1_228_800, "flops": 1e12, "seconds": 60.0,
        }  # fmt: skip
        curve = [{"step": s, "tokens": s * 4096, "flops": s * 1e9, "val/lm": loss + 300 - s} for s in (100, 200, 300)]
        lines = [{"step": 10, "train/loss": 5.0, "tokens": 40960, "flops": 1e10}, *curve]
        self.add(
            [f"loss={method}", f"seed={seed}"],
            {
                "result.json": json.dumps(result),
                "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30',
            },
        )
        return self

    def wrote(self, method, seed, rouge, loss=2.5, curve=(0.0, 0.1), prompts=7, text="a", says=None, **config):
        """A finished run on instructions, whose responses have this Rouge-L; two samples of each prompt."""
        self.done(method, seed, loss, **{"data": "instructions", "responses.seed": 0} | config)
        folder = self.root / f"run-{len(self.runs) - 1}"
        result = json.loads((folder / "result.json").read_text())
        result["final"] |= {"val/rouge_l": rouge, "val/teacher_rouge_l": 0.5, "val/exaccerr": 0.25}
        lines = [
            {"row": row, "sample": sample, "prompt": f"p{row}", "reference": f"r{row}", "rouge_l": rouge,
             "response": f"{text}{row}.{sample}", "teacher": f"t{row}.{sample}", "teacher_rouge_l": 0.5} | (says or {})
            for sample in (0, 1) for row in range(prompts)
        ]  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "exaccerr.json").write_text(json.dumps({"exaccerr": list(curve)}))
        return self

    def began(self, **initial):
        """What the last run was before its training."""
        path = self.root / self.runs[-1]["run"] / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"initial": initial}))
        return self

    def losses(self, **of):
        """Runs with seeds 0, 1, … of each method."""
        for method, values in of.items():
            for seed, loss in enumerate(values):
                self.done(method, seed, loss)
        return self

    def add(self, overrides, files=None):
        folder = self.root / f"run-{len(self.runs)}"
        self.runs.append({"run": folder.name, "overrides": overrides})
        for name, text in (files or {}).items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return self

    def groups(self):
        return compare.grouped([compare.read(self.root, line) for line in self.runs])

    def finding(self):
        return finding(self.groups())

    def page(self):
        """The HTML without plotly's own code, and the line that is printed."""
        (self.root / "sweeps").mkdir(exist_ok=True)
        (self.root / "sweeps" / f"{self.name}.json").write_text(json.dumps({"name": self.name, "runs": self.runs}))
        path, says = report.write(self.root, self.name)
        return path.read_text().replace(get_plotlyjs(), ""), says


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def cells(page, label):
    """Texts of the row of the table of numbers that begins with label."""
    table = page[page.index('<table class="numbers">') : page.index("<dl>")]
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.S):
        texts = [
            " ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        ]
        if texts and texts[0] == label:
            return texts
    raise AssertionError(f"no row {label}")


def test_runs_of_teachers_and_starts_that_were_made_otherwise_are_rows_of_their_own(sweep):
    told = {"data": "instructions", "teacher.steps": 300}
    for steps in (300, 1200):
        for seed in (0, 1):
            sweep.done("fkl", seed, 2.0 + seed / 10 + steps / 1e4, **{"teacher.steps": steps})
            sweep.done("lm", seed, 3.0, **{"teacher.steps": steps})  # which learns from none
    sweep.done("fkl", 0, 2.5, **{"start": "pretrained", "start.steps": 7, **told})
    sweep.done("fkl", 0, 2.6, **{"start": "pretrained", "start.steps": 9, **told})
    labels = {group.label: sorted(group.runs) for group in sweep.groups()}
    assert len(labels) == 5 and sorted(map(len, labels.values())) == [1, 1, 2, 2, 2]
    assert any("teacher.steps=300" in of for of in labels) and any("start.steps=9" in of for of in labels)


def test_a_teacher_has_one_row_whoever_learned_from_it(sweep):
    made = {"teacher.steps": 300, "teacher.seed": 0}
    sweep.done("fkl", 0, 2.0, **made).done("lm", 0, 2.5, rollout="teacher", **made).done("lm", 0, 3.0, **made)
    assert len(sweep.groups()) == 3
    assert [mark.label for mark in table.marks(sweep.groups())] == ["teacher 1m"]
    sweep.done("fkl", 0, 2.0, **made | {"teacher.steps": 600})
    labels = sorted(mark.label for mark in table.marks(sweep.groups()))
    assert labels == ["teacher teacher.steps=300", "teacher teacher.steps=600"]


def test_numbers_of_the_table_are_those_made_by_hand(sweep):
    lm, fkl = [2.50, 2.47, 2.44], [2.36, 2.30, 2.31]
    page, _ = sweep.losses(lm=lm, fkl=fkl).page()
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
    assert cells(page, compare.ALONE)[2:4] == ["baseline", "–"]
    teacher = cells(page, "teacher 1m")
    assert (teacher[1].split()[0], teacher[8]) == ("1.9000", "0.012")


def test_difference_to_the_first_is_paired_and_stands_where_rows_have_rivals(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.36, 2.30, 2.31], rkl=[2.41, 2.36, 2.37], jsd=[2.35, 2.33, 2.31])
    page, _ = sweep.page()
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * statistics.stdev([0.05, 0.06, 0.06]) / math.sqrt(3)
    assert cells(page, "")[3] == "to the first"
    assert [cells(page, name)[3] for name in ("fkl", "rkl")] == ["first", f"+{0.17 / 3:.4f} ± {half:.4f}"]
    assert cells(page, "jsd")[3].endswith("within noise") and cells(page, compare.ALONE)[3].startswith("+0.1467 ±")
    assert "to the first" in (sweep.root / "sweeps" / "s.md").read_text()
    lines = (sweep.root / "sweeps" / "s.csv").read_text().splitlines()
    at = lines[0].split(",").index("to_the_first")
    assert [float(line.split(",")[at]) for line in lines[7:10]] == pytest.approx([0.05, 0.06, 0.06])
    assert "5 differences" not in page and "6 differences have intervals of 95% each" in page
    assert "16,384 in all" in page and "One teacher was used" in page


def test_columns_that_tell_nothing_are_no_columns(sweep):
    page, _ = sweep.losses(lm=[2.5, 2.6], fkl=[2.4, 2.5]).page()
    assert "bits per byte" not in page and cells(page, "")[4:7] == ["fkl", "rkl", "acceptance"]
    found = sweep.groups()
    measures = table.measures(found, compare.LOSS)
    assert table.alike(found, measures, []) == {"val/ece": "0.032"}  # of the students; the teacher's is another
    assert table.alike(found, measures, table.marks(found)) == {}
    other = json.loads((sweep.root / "run-0" / "result.json").read_text()) | {"bytes_per_token": 4.0}
    (sweep.root / "run-0" / "result.json").write_text(json.dumps(other))
    assert "val/bpb" in table.measures(sweep.groups(), compare.LOSS)  # losses of two tokenizers cannot be compared


def test_a_gap_to_another_teacher_has_a_footnote(sweep):
    for source in ("online", "cotrained"):
        sweep.done("fkl", 0, 2.4, logits=source)
    page, _ = sweep.done("lm", 0, 2.5).page()
    assert cells(page, "logits=cotrained")[4] == "17% †" and cells(page, "logits=online")[4] == "17%"
    assert "† Of the way to another teacher" in page and " † Its own" in (sweep.root / "sweeps" / "s.md").read_text()


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (5, 2.7764), (31, 2.0423), (100, 2.0423)])
def test_interval_is_that_of_student(n, t):
    values = [0.1 * i * (-1) ** i for i in range(n)]
    got = compare.interval(values)
    assert got.mean == pytest.approx(statistics.mean(values))
    assert got.half == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=1e-3)
    assert compare.interval([1.0]) == (1.0, None, 1) and compare.interval([]) is None


def test_difference_is_paired_over_the_seeds_that_both_have(sweep):
    sweep.losses(lm=[2.5, 3.5], fkl=[2.4, 3.3, 9.0])
    groups = {g.label: g for g in sweep.groups()}
    change = compare.difference(groups["fkl"], groups[compare.ALONE])
    # The seeds differ by 1, their differences by 0.1: pairing is what makes the interval narrow.
    assert change.n == 2 and change.mean == pytest.approx(-0.15) and change.half < 1
    assert compare.closed(groups["fkl"], groups[compare.ALONE]).mean == pytest.approx(0.15 / (3 - TEACHER))
    page, _ = sweep.page()
    assert "Rows differ in their seeds" in page and [cells(page, name)[-2] for name in ("", "fkl")] == ["seeds", "3"]


def test_the_gap_is_closed_over_the_seeds_of_all_and_has_an_interval(sweep):
    for seed, loss in ((1, 3.0), (2, 3.2)):
        sweep.done("lm", seed, loss)
    for seed, loss, teacher in ((1, 2.8, 2.5), (2, 2.9, 2.5), (3, 2.7, 2.2)):
        sweep.done("fkl", seed, loss)
        path = sweep.root / sweep.runs[-1]["run"] / "result.json"
        result = json.loads(path.read_text())
        result["final"]["val/teacher_lm"] = teacher
        path.write_text(json.dumps(result))
    groups = {g.label: g for g in sweep.groups()}
    share = compare.closed(groups["fkl"], groups[compare.ALONE])
    # (0.2 + 0.3) / (0.5 + 0.7); what is left of the changes, 0.2 - 0.5 share and 0.3 - 0.7 share, over the mean gap 0.6
    left = [(0.2 - 0.5 * 5 / 12) / 0.6, (0.3 - 0.7 * 5 / 12) / 0.6]
    assert share.mean == pytest.approx(5 / 12) and share.n == 2
    assert share.half == pytest.approx(12.706 * statistics.stdev(left) / math.sqrt(2))
    assert compare.closed(groups[compare.ALONE], groups[compare.ALONE]) is None


def test_labels_say_what_varies_and_no_more(sweep):
    sweep.done("lm", 0, 2.5)
    for tau in (1.0, 2.0):
        sweep.done("fkl", 0, 2.3, **{"temperature.tau": tau})
    sweep.done("akl", 0, 2.4)
    assert {g.label for g in sweep.groups()} == {compare.ALONE, "fkl tau=1", "fkl tau=2", "akl tau=1"}


def test_labels_of_one_loss_of_sizes_and_of_what_is_no_part_of_a_run(sweep, tmp_path):
    sweep.done("lm", 0, 2.5, root="a").done("lm", 1, 2.5, root="b", **{"alpha.peak": 0.1}).done("akl", 0, 2.4)
    assert [g.label for g in sweep.groups()] == ["akl", compare.ALONE]
    sizes = Sweep(tmp_path / "sizes")
    for size in ("100k", "1m"):
        sizes.done("lm", 0, 2.5, **{"student.size": size}).done("fkl", 0, 2.4, **{"student.size": size})
    assert {g.label for g in sizes.groups()} >= {"student=1m", f"{compare.ALONE} student=100k"}


def test_labels_of_sources_say_nothing_that_is_alike_and_a_teacher_that_learns_is_another(sweep):
    for source in ("online", "cotrained"):
        sweep.done("fkl", 0, 2.4, logits=source, **{"teacher.seed": 0})
    for window in (None, "early", "late"):
        of = "recorded" if window else "offline"
        sweep.done("fkl", 0, 2.3, logits=of, **{"teacher.seed": 0, "logits.window": window})
    sources = {"logits=online", "logits=cotrained", "logits=offline"}
    assert {g.label for g in sweep.groups()} == sources | {
        f"logits=recorded logits.window={w}" for w in ("early", "late")
    }
    assert [mark.label for mark in table.marks(sweep.groups())].count("teacher 1m, cotrained") == 1
    assert len(table.marks(sweep.groups())) == 2


def test_labels_have_tokens_for_steps_but_where_rows_are_not_full(sweep, tmp_path):
    sweep.done("fkl", 0, 2.5, **{"trainer.steps": 300}).done("fkl", 0, 2.4, **{"trainer.steps": 600})
    assert [g.label for g in sweep.groups()] == ["tokens=2.46M", "tokens=1.23M"]  # 600 or 300 times 16 rows of 256
    texts = Sweep(tmp_path / "texts")
    for steps, rouge in ((300, 0.2), (600, 0.3)):
        texts.wrote("fkl", 0, rouge, **{"trainer.steps": steps})
    assert [g.label for g in texts.groups()] == ["trainer.steps=600", "trainer.steps=300"]


def test_learning_curve_is_the_mean_at_the_steps_of_all_seeds(sweep):
    (group,) = sweep.losses(fkl=[2.0, 3.0]).groups()
    assert compare.curve(group) == [(s * 4096, s * 1e9, 2.5 + 300 - s) for s in (100, 200, 300)]


def test_failed_missing_unfinished_and_damaged_runs_are_listed_and_not_counted(sweep):
    sweep.losses(lm=[2.5], fkl=[2.3])
    diverged = {"state": "diverged", "reason": "train/loss is not finite at step 7"}
    sweep.add(["loss=rkl"], {"state.json": json.dumps(diverged)})
    gone = json.dumps({"state": "running", "pid": 1, "host": socket.gethostname(), "boot": "an earlier one"})
    sweep.add(["loss=jsd"], {"state.json": gone}).add(["loss=mse", "data.files=my text.txt"])
    sweep.add(["loss=tvd"], {"result.json": '{"state": '}).add(["loss=skl"], {"result.json": '{"state": "done"}'})
    sweep.done("akl", 0, math.nan)
    page, says = sweep.page()
    states = re.findall(r'<td class="state ([\w ]+)">', page[page.index('<table class="runs">') :])
    assert states == [
        "done", "done", "diverged", "stale", "missing", "damaged", "damaged", "damaged",
    ]  # fmt: skip
    assert "train/loss is not finite at step 7" in page
    assert "python train.py loss=mse &#39;data.files=my text.txt&#39;" in page
    assert says.startswith("fkl: 2.300") and "[6 of 8 runs are not done and not counted]" in says
    with pytest.raises(AssertionError, match="no row"):
        cells(page, "akl")


def test_one_seed_is_said_to_have_no_error_bar(sweep):
    says = sweep.losses(lm=[2.455], fkl=[2.33], akl=[2.31]).finding()
    assert says == (
        "of 2 losses, akl is lowest: 2.310 nats per token on held-out text against 2.455 for language modelling alone, "
        "closing 26% of the gap to the teacher (1 seed: no error bar, so a small difference may be chance)"
    )


def test_several_seeds_give_an_interval_and_name_what_is_as_good(sweep):
    says = sweep.losses(
        lm=[2.50, 2.47, 2.44], fkl=[2.31, 2.29, 2.26], akl=[2.31, 2.28, 2.25], tvd=[2.4, 2.38, 2.35]
    ).finding()
    assert says.startswith("of 3 losses, akl is lowest: 2.280 nats per token on held-out text against 2.470 for")
    assert re.search(r"0\.190 ± 0\.0\d\d lower \(3 seeds, paired, 95% interval\), closing 33% ± 4% of the gap", says)
    assert says.endswith("; fkl cannot be told apart from akl")


def test_one_of_fewer_seeds_is_named_where_it_is_ahead_on_these(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.30, 2.29, 2.26], akl=[2.31])
    assert sweep.finding().startswith("of 2 losses, fkl is lowest: 2.283")  # akl has the larger gain, 0.19, on seed 0
    says = sweep.done("rkl", 0, 2.29).finding()
    assert says.startswith("of 3 losses, fkl is lowest: 2.283")  # rkl is ahead of it on seed 0, which may be luck
    assert says.endswith("; ahead of it on 1 seed, which may be chance: rkl")


def test_one_of_fewer_seeds_leads_where_it_is_ahead_beyond_noise(sweep):
    sweep.losses(fkl=[2.30, 2.29, 2.31, 2.28], akl=[2.20, 2.19, 2.21])
    assert sweep.finding().startswith("of 2 losses, akl is best")


def test_a_seed_alone_leads_nothing_that_has_several(sweep):
    sweep.losses(lm=[2.5] * 3, fkl=[2.30, 2.29, 2.31], akl=[2.2999])
    assert sweep.finding().startswith("of 2 losses, fkl is lowest: 2.300")


def test_within_noise_is_said(sweep):
    says = sweep.losses(lm=[2.50, 2.40, 2.45], fkl=[2.40, 2.48, 2.42]).finding()
    assert "which is within noise: no gain is shown" in says and "closing" not in says and "best" not in says


@pytest.mark.parametrize("methods", [("fkl", "rkl"), ("fkl", "rkl", "jsd", "akl", "tvd", "skl")])
def test_as_many_differences_look_real_by_chance_as_5_percent_are(sweep, methods):
    losses = {name: [2.4 + 0.01 * number, 2.41, 2.39] for number, name in enumerate(methods)}
    page, _ = sweep.losses(lm=[2.5, 2.52, 2.49], **losses).page()
    count, chance = re.search(r"(\d+) differences have intervals.*about ([\d.]+) would still look", page).groups()
    assert int(count) == 2 * len(methods) and float(chance) == pytest.approx(0.05 * int(count), rel=0.02)


def test_a_sure_gain_behind_an_unsure_one_is_named(sweep):
    says = sweep.losses(lm=[2.5, 2.5, 2.5], fkl=[1.95, 2.6, 2.6], rkl=[2.45, 2.44, 2.46]).finding()
    assert "fkl is lowest" in says and "within noise" in says and "better beyond noise: rkl" in says


@pytest.mark.parametrize("lm", [[2.3], [2.3, 2.31, 2.29]])
def test_nothing_better_is_said(sweep, lm):
    says = sweep.losses(lm=lm, fkl=[x + 0.1 for x in lm], rkl=[x + 0.2 for x in lm]).finding()
    assert "fkl is lowest" in says and f"nothing here beats {compare.ALONE}" in says and "best" not in says


def test_without_a_baseline_the_best_stands_alone(sweep, tmp_path):
    says = sweep.losses(fkl=[2.3, 2.4], rkl=[2.5, 2.6]).finding()
    assert says.startswith("of 2 losses, fkl is best: 2.350") and "± 0.635 (2 seeds" in says
    assert says.endswith("there is no run by language modelling alone to compare with (logits=none)")
    only = Sweep(tmp_path / "only").losses(lm=[2.3])
    assert only.finding().startswith(f"{compare.ALONE}: 2.300") and "compare" not in only.finding()


def test_lines_that_go_by_a_name_are_compared_on_each_student(sweep):
    for size, shift in (("100k", 0.0), ("200k", 0.2), ("1m", 0.1)):
        for seed in range(3):
            loss = 2.5 - shift + 0.01 * seed
            sweep.done("lm", seed, loss, **{"student.size": size})
            sweep.done("fkl", seed, loss - 0.1, **{"student.size": size, "alpha.peak": 0.5})
            sweep.done("nll", seed, loss - 0.1 + shift * (1 + 0.1 * seed), **{"student.size": size})
            sweep.runs[-2]["name"], sweep.runs[-1]["name"] = "best of all", "plain distillation"
    says = sweep.finding()
    assert "in 3 of 3 settings of student, data and tokens the best distilled student has a lower loss" in says
    firsts = "; of those distilled, lowest for all 3 students is best of all; ahead of the next beyond noise in 2 of 3"
    assert says.endswith(firsts)
    plot = space.heat(table.rows(sweep.groups()))
    assert {t for t in plot.figure.layout.xaxis.ticktext + plot.figure.layout.yaxis.ticktext} == {
        "best of all", "plain distillation", "100k", "200k", "1m"}  # fmt: skip


def test_rates_are_compared_at_each_size(sweep):
    for size, shift in (("100k", 0.0), ("1m", 0.5)):
        for rate, more in ((0.004, 0.1), (0.008, 0.0)):
            for seed in range(3):
                loss = 3.0 - shift + more + 0.01 * seed * (1 + more)
                sweep.done("lm", seed, loss, **{"student.size": size, "lr.peak": rate, "teacher.size": None})
    says = sweep.finding()
    head = cells(sweep.page()[0], "")
    assert "gap closed" not in head and "to the first" not in head  # no teacher, and the first is the baseline
    assert says == "lowest for all 2 students is lr.peak=0.008; ahead of the next beyond noise in 2 of 2"
    for seed in range(3):
        sweep.done("lm", seed, 2.8 + 0.02 * seed, **{"student.size": "100k", "lr.peak": 0.002, "teacher.size": None})
    assert sweep.finding().startswith("lowest is lr.peak=0.008 for student=1m, lr.peak=0.002 for student=100k; ahead")


def test_a_rate_that_leads_with_one_seed_is_not_beyond_noise(sweep):
    for size in ("100k", "1m"):
        for rate, loss in ((0.004, 2.6), (0.008, 2.5)):
            sweep.done("lm", 0, loss, **{"student.size": size, "lr.peak": rate})
    assert sweep.finding().endswith("; ahead of the next beyond noise in 0 of 2")


def test_students_are_compared_with_their_like(sweep):
    for size, gain in (("100k", 0.1), ("1m", -0.1)):
        for seed in range(3):
            sweep.done("lm", seed, 2.5 + seed, **{"student.size": size})
            sweep.done("fkl", seed, 2.5 + seed - gain + seed / 1000, **{"student.size": size})
    says = sweep.finding()
    assert says.startswith("in 1 of 2 settings") and "beyond noise in 1 (paired" in says


def test_warns_of_other_code_and_other_text(sweep):
    sweep.done("lm", 0, 2.5).done("fkl", 0, 2.4, git="def+").done("rkl", 0, 2.4, **{"data.val_rows": 32})
    page, _ = sweep.page()
    assert "Runs differ in git revision" in page and "2 of abc, 1 of def+" in page and "not committed" in page
    assert "Held-out text differs (data.val_rows)" in page


def test_entropy_is_shown_where_it_is_known_and_a_run_without_teacher_has_dashes(sweep):
    page, _ = sweep.done("lm", 0, 2.5, entropy=1.2618, **{"teacher.size": None}).page()
    assert cells(page, "entropy of the data")[1] == "1.2618"
    assert 'id="val-fkl"' not in page and 'id="val-ece"' in page


def test_students_before_training_have_a_row_for_each_of_what_they_start_from(sweep):
    pretrained = {"start": "pretrained", "student.size": None, "student.name": "a"}
    for seed, before in enumerate((4.0, 5.0)):
        sweep.done("fkl", seed, 2.0, **pretrained).began(**{"val/lm": before, "val/fkl": 0.75, "tokens": 0})
    page, _ = sweep.done("rkl", 0, 2.1).page()
    row = cells(page, "before training")
    assert row[1].split()[0] == "4.5000" and "0.750" in row
    assert f"| before training | {row[1].split()[0]} |" in (sweep.root / "sweeps" / "s.md").read_text()
    sweep.done("fkl", 0, 2.0, **pretrained | {"start": "sft"}).began(**{"val/lm": 3.0})
    labels = sorted(mark.label for mark in table.marks(sweep.groups()))
    assert labels == ["before training start=pretrained", "before training start=sft", "teacher 1m"]


def test_students_that_begin_at_random_have_no_row_before_training(sweep):
    page, _ = sweep.done("fkl", 0, 2.0).began().done("rkl", 0, 2.1).page()
    assert "before training" not in page


def test_nothing_is_loaded_and_nothing_injected(sweep):
    evil = "</script><img src=x onerror=alert(1)>"
    sweep.losses(lm=[2.5, 2.6]).done(evil, 0, 2.4).done(evil, 1, 2.5, git=evil).done(
        "fkl", 0, 2.3, **{"data.name": evil}
    )
    sweep.add([f"loss={evil}"], {"state.json": json.dumps({"state": "failed", "reason": evil})})
    page, _ = sweep.page()
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("<script") == page.count("</script>") == 1 + page.count('class="plotly-graph-div"')
    assert not re.search(r"<(script|img|iframe|source)[^>]+src=|<link|@import|url\(|https?://", page)
    assert "default-src 'none'" in page


def test_unknown_sweep_lists_those_there_are(sweep, capsys):
    sweep.losses(fkl=[2.3]).page()
    assert report.main(["nope", "--root", str(sweep.root)]) == 2
    error = capsys.readouterr().err
    assert "There: s." in error and "python train.py sweeps=nope" in error and "Traceback" not in error


def test_no_finished_run_lists_their_states(sweep):
    sweep.add(["loss=fkl"]).add(["loss=rkl"], {"state.json": '{"state": "failed", "reason": "out of luck"}'})
    with pytest.raises(UserError, match=r"(?s)No run .* done yet.*missing +loss=fkl.*failed +loss=rkl  out of luck"):
        sweep.page()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [{}]}', '{"runs": 3}'])
def test_damaged_manifest_says_what_to_type(tmp_path, text):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged.*python train.py sweeps=s"):
        report.write(tmp_path, "s")


def test_main_prints_one_line_and_the_root_comes_from_the_environment(sweep, capsys, monkeypatch):
    sweep.losses(lm=[2.5], fkl=[2.3]).page()
    monkeypatch.setenv("KD_ROOT", str(sweep.root))
    assert report.main(["s"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"{sweep.root / 'sweeps' / 's.html'}: fkl: 2.300 nats per token")


# Sweeps on instructions


def test_numbers_of_a_table_of_responses_are_those_made_by_hand(sweep):
    lm, fkl = [0.20, 0.22, 0.24], [0.30, 0.33, 0.33]
    for seed in range(3):
        sweep.wrote("lm", seed, lm[seed], 2.0).wrote("fkl", seed, fkl[seed], 2.4)
    page, says = sweep.page()
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
    assert says.startswith("fkl: 0.320 Rouge-L on held-out prompts against 0.220 for SFT, 0.100 ±")
    assert "higher (3 seeds, paired, 95% interval), closing 36% ± 8% of the gap to the teacher" in says
    lines = (sweep.root / "sweeps" / "s.csv").read_text().splitlines()
    assert float(lines[2].split(",")[lines[0].split(",").index("difference")]) == pytest.approx(0.1)


def test_the_highest_rouge_l_comes_first_whatever_the_loss(sweep):
    sweep.wrote("lm", 0, 0.2, 1.0).wrote("fkl", 0, 0.3, 3.0).wrote("rkl", 0, 0.1, 2.0)
    assert [g.label for g in sweep.groups()] == ["fkl", "SFT", "rkl"]
    assert sweep.finding().startswith("of 2 losses, fkl is highest: 0.300")
    page, _ = sweep.page()
    assert '"bad"' not in page and cells(page, "rkl")[2] == "−0.1000"


def test_nothing_better_is_said_of_responses_too(sweep):
    for seed in range(3):
        sweep.wrote("lm", seed, 0.3 + seed / 1000).wrote("fkl", seed, 0.2)
    says = sweep.finding()
    assert "lower (3 seeds" in says and "nothing here beats SFT" in says
    assert 'class="bad">−0.1010' in sweep.page()[0]


def test_over_tasks_the_better_rouge_l_counts(sweep):
    for size, gain in (("100k", 0.1), ("1m", -0.1)):
        for seed in range(3):
            sweep.wrote("lm", seed, 0.3, **{"student.size": size})
            sweep.wrote("fkl", seed, 0.3 + gain + seed / 1000, **{"student.size": size})
    says = sweep.finding()
    assert says.startswith("in 1 of 2 settings") and "a higher Rouge-L" in says and "beyond noise in 1" in says


def test_a_run_without_responses_has_the_sweep_judged_by_loss(sweep):
    says = sweep.wrote("lm", 0, 0.2, 2.5).wrote("fkl", 0, 0.3, 2.4).done("rkl", 0, 2.3, data="instructions")
    assert "rkl is lowest: 2.300 nats per token" in says.finding()


def test_a_student_of_text_that_a_teacher_wrote_is_no_baseline(sweep):
    sweep.wrote("lm", 0, 0.2).wrote("lm", 0, 0.4, rollout="teacher").wrote("fkl", 0, 0.3)
    groups = {g.alone: g for g in sweep.groups()}
    (best, *_), alone = sweep.groups(), groups[True]
    assert [g.label for g in sweep.groups()] == ["SeqKD", "fkl", "SFT"]
    assert not best.alone and compare.baseline(best, sweep.groups()).label == alone.label == "SFT"
    assert "against 0.200 for" in sweep.finding()


def test_rows_that_learned_from_more_tokens_in_the_same_steps_are_warned_of(sweep):
    sweep.wrote("lm", 0, 0.2).wrote("fkl", 0, 0.3)
    page, _ = sweep.page()
    assert "The same in all rows: ece 0.032" not in page and "The same in all rows: exaccerr 0.250." in page
    assert "different numbers of tokens" not in page and "with the same student, data and steps, seed by seed" in page
    path = sweep.root / "run-1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 3_000_000}))
    page, _ = sweep.page()
    assert "different numbers of tokens in the same steps, 1.23M (SFT) to 3M (fkl): a row that is better may" in page
    assert "student, data and tokens" not in page + (sweep.root / "sweeps" / "s.md").read_text()


def test_excess_error_is_the_mean_as_far_as_all_seeds_have_one(sweep):
    (group,) = sweep.wrote("fkl", 0, 0.3, curve=[0, 0.2, 0.4]).wrote("fkl", 1, 0.3, curve=[0, 0.4]).groups()
    assert compare.excess(group) == pytest.approx([0, 0.3])
    assert 'id="exposure"' in sweep.page()[0]
    (sweep.root / "run-1" / "exaccerr.json").write_text("{")
    assert compare.excess(group) == [] and 'id="exposure"' not in sweep.page()[0]


def test_samples_stand_side_by_side_and_are_chosen_by_their_place(sweep):
    sweep.wrote("lm", 0, 0.2, text="x").wrote("fkl", 1, 0.31, text="y").wrote("fkl", 0, 0.3, text="z")
    found = samples(rows(sweep.groups()))
    assert [s.number for s in found] == [1, 2, 3, 5, 6]  # of 7
    assert [(x.who, x.text, x.rouge_l) for x in found[3].said] == [
        ("prompt", "p4", None), ("reference", "r4", None), ("teacher 1m", "t4.0", 0.5), ("fkl", "z4.0", 0.3),
        ("SFT", "x4.0", 0.2),
    ]  # fmt: skip
    page, _ = sweep.page()
    assert re.search(r"<pre>\s*z4\.0</pre>", page) and not re.search(r"<pre>\s*z3\.0</pre>", page)
    markdown = (sweep.root / "sweeps" / "s.md").read_text()
    assert "**teacher 1m** (Rouge-L 0.50)\n\n```text\nt4.0\n```" in markdown and "- rouge-l" not in markdown


@pytest.mark.parametrize(
    "says", [{"prompt": "other"}, {"response": 3}, {"row": "0"}, {"sample": None}, {"prompt": ["p"]}, []]
)
def test_what_was_asked_otherwise_or_is_damaged_is_no_sample(sweep, says):
    sweep.wrote("lm", 0, 0.3).wrote("fkl", 0, 0.2)
    if says == []:
        (sweep.root / "run-1" / "responses.jsonl").write_text('{"row": 0')
    else:
        sweep.runs.pop()
        sweep.wrote("fkl", 0, 0.2, says=says)
    assert [x.who for x in samples(rows(sweep.groups()))[0].said[3:]] == ["SFT"]
    sweep.page()


def test_responses_that_were_drawn_otherwise_are_said_and_not_put_beside(sweep):
    sweep.wrote("lm", 0, 0.3, **{"responses.temperature": 0.0}).wrote("fkl", 0, 0.2, **{"responses.temperature": 1.0})
    assert "in different ways (responses.temperature)" in sweep.page()[0]
    assert [x.who for x in samples(rows(sweep.groups()))[0].said[3:]] == ["SFT"]


def test_nothing_in_a_response_is_markup(sweep):
    evil = "</pre><script>alert(1)</script>\n````\n# head\x1b[2J\u202e"
    sweep.wrote("lm", 0, 0.3, says={"response": evil, "prompt": evil, "teacher": evil, "rouge_l": "<b>"})
    page, _ = sweep.page()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    markdown = (sweep.root / "sweeps" / "s.md").read_text()
    assert "\x1b" not in page + markdown and "\u202e" not in page + markdown
    inside = markdown[markdown.index("`````text\n") :]  # a fence of five, since there is one of four within
    assert inside.index("# head") < inside.index("\n`````\n", 5)
