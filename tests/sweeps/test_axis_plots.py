"""What a report says of the axes of a sweep, against numbers made by hand; and the report as Markdown and CSV."""

import csv
import json
import math
import re
import statistics

import pytest
from markdown_it import MarkdownIt

from sweeps import compare, export, report, shapes, space
from sweeps import table as table_
from sweeps.plots import dots, folded
from sweeps.table import rows
from tests.test_report import TEACHER, Sweep, cells

T2 = 4.303  # 97.5% quantile of Student's t with 2 degrees of freedom
COSINE = {"lr": "cosine", "lr.peak": 0.002, "lr.end": 0.0, "lr.warmup": 0.0}
CONSTANT = {"lr": "constant", "lr.peak": 0.001, "lr.warmup": 0.0}
RISING = {"alpha": "linear_increasing", "alpha.start": 0.0, "alpha.peak": 1.0}
FALLING = {"alpha": "linear_decreasing", "alpha.peak": 1.0, "alpha.end": 0.2, "alpha.warmup": 0.0}
EVIL = "</script><img src=x onerror=alert(1)>|`*[a](b)"


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def table(sweep):
    return rows(sweep.groups())


def crossed(sweep, gains, seeds=(0.0, 0.01, 0.02)):
    """Each temperature with each peak, this much below language modelling alone, seed by seed."""
    for seed, shift in enumerate(seeds):
        sweep.done("lm", seed, 2.5 + shift)
        for (tau, peak), gain in gains.items():
            sweep.done("fkl", seed, 2.5 + shift - gain[seed], **{"temperature.tau": tau, "alpha.peak": peak})
    return sweep


GAINS = {
    (1.0, 0.5): (0.10, 0.11, 0.12), (2.0, 0.5): (0.01, -0.02, 0.01), (4.0, 0.5): (-0.2, -0.21, -0.22),
    (1.0, 0.9): (0.20, 0.21, 0.19), (2.0, 0.9): (0.05, 0.05, 0.06),
}  # fmt: skip


def test_heat_map_shows_the_paired_differences_and_marks_those_within_noise(sweep):
    plot = space.heat(table(crossed(sweep, GAINS)))
    heat = plot.figure.data[0]
    want = [[0.11, 0.20], [0.0, 0.16 / 3], [-0.21, None]]  # by temperature down, by peak across
    assert [len(line) for line in heat.z] == [2, 2, 2]
    for line, gains in zip(heat.z, want):
        assert [z if z is None else -z for z in line] == [g if g is None else pytest.approx(g, abs=1e-9) for g in gains]
    assert list(plot.figure.layout.yaxis.ticktext) == ["1", "2", "4"]
    assert list(plot.figure.layout.xaxis.ticktext) == ["0.5", "0.9"]
    assert heat.zmin == -heat.zmax == pytest.approx(-0.21) and heat.colorscale[0][1].startswith("rgba(59, 120, 216")
    texts = {(a.x, a.y): a.text for a in plot.figure.layout.annotations}
    half = T2 * statistics.stdev([0.10, 0.11, 0.12]) / math.sqrt(3)
    assert texts[0, 0].startswith("−0.1100<br>") and f"± {half:.4f}" in texts[0, 0]
    assert texts[0, 1].startswith("≈ ") and texts[1, 2] == "–"
    frames = [((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in plot.figure.layout.shapes]
    assert frames == [pytest.approx((0, 1))] and not any("≈" in t for at, t in texts.items() if at != (0, 1))
    assert plot.says == (
        "Lowest with tau=1 alpha.peak=0.9, −0.2000 nats per token; 3 of 5 are better than language modelling alone "
        "beyond noise, 1 worse, and 1 within noise; a dotted frame and ≈ mark cells within noise of language modelling "
        "alone; 1 cell without a finished run."
    )


def test_heat_map_without_a_baseline_is_of_the_loss(sweep):
    for tau, peak, loss in ((1.0, 0.5, 2.1), (1.0, 0.9, 2.2), (2.0, 0.5, 2.3), (2.0, 0.9, 2.4)):
        sweep.done("fkl", 0, loss, **{"temperature.tau": tau, "alpha.peak": peak})
    plot = space.heat(table(sweep))
    assert sorted(map(list, plot.figure.data[0].z)) == [[2.1, 2.2], [2.3, 2.4]] and plot.title.startswith("loss")
    assert not plot.figure.layout.shapes and "noise" not in plot.says


def test_losses_of_different_students_are_not_compared(sweep):
    for size, shift in (("100k", 0.0), ("1m", 0.5)):
        for rate, more in ((0.002, 0.2), (0.004, 0.1), (0.008, 0.0)):
            for seed in range(3):
                wide = 0.3 if (size, rate) == ("1m", 0.004) else 0.01 * (1 + more)
                sweep.done(
                    "lm", seed, 3.0 - shift + more + wide * (seed - 1), **{"student.size": size, "lr.peak": rate}
                )
    plot = space.heat(table(sweep))
    z = sorted(z for line in plot.figure.data[0].z for z in line)
    assert z[:2] == [0, 0] and z[2] < 0.2  # above the lowest of the same student
    assert plot.says.startswith(
        "Lowest for all 2 students is lr.peak=0.008; ahead of the next beyond noise in 1 of 2; colours are of the loss "
        "above the lowest of the same student, data and tokens"
    )
    framed = [a for a in plot.figure.layout.annotations if "≈" in a.text]
    assert len(framed) == 1 and "Lowest at" not in " ".join(p.says for p in space.over(table(sweep)))
    assert plot.figure.layout.xaxis.title.text == "student" or plot.figure.layout.yaxis.title.text == "student"


def test_labels_of_axes_have_room(sweep):
    assert folded("linear_decreasing", 12) == "linear_<br>decreasing"
    assert folded("random target=renormalise", 15) == "random target=<br>renormalise"
    assert folded("alpha top_k k=3", 10) == "alpha<br>top_k k=3"  # what fits a line is not broken
    for temperature in ("linear_increasing", "fixed"):
        for alpha in ("wsd", "constant"):
            for peak in (0.5, 0.9):
                sweep.done("fkl", 0, 2.0 + peak, **{"alpha": alpha, "temperature": temperature, "alpha.peak": peak})
    plot = space.parallel(table(sweep))
    assert plot.figure.layout.margin.l > 7 * len("increasing")
    near = dots(table(sweep), "val/lm", [table_.Mark("language modelling alone", "dash", {"val/lm": 2.9})])
    (level,) = [a for a in near.layout.annotations if "alone" in a.text]
    assert level.xanchor == "right"  # in a narrow window there is more room over the labels on the left
    far = dots(table(sweep), "val/lm", [table_.Mark("teacher 1m", "solid", {"val/lm": 1.0})])
    assert [a.xanchor for a in far.layout.annotations if "teacher" in a.text] == ["left"]


def test_heat_map_needs_two_axes_that_are_crossed(sweep, tmp_path):
    sweep.done("fkl", 0, 2.1, truncation="full")
    for k in (1, 10, 100):
        sweep.done("fkl", 0, 2.2, **{"truncation": "top_p_k", "truncation.k": k})
    assert space.heat(table(sweep)) is None  # k belongs to one of the two truncations
    cross = Sweep(tmp_path / "cross")
    for tau, peak in ((1.0, 0.5), (1.0, 0.9), (2.0, 0.5)):
        cross.done("fkl", 0, 2.2, **{"temperature.tau": tau, "alpha.peak": peak})
    assert space.heat(table(cross)) is None
    assert space.heat(table(Sweep(tmp_path / "one").losses(fkl=[2.1], rkl=[2.2], jsd=[2.3]))) is None


def test_settings_that_vary_together_are_one_axis(sweep):
    for size, rate, tau in (("100k", 0.1, 1.0), ("1m", 0.2, 1.0), ("1m", 0.2, 2.0)):
        sweep.done("fkl", 0, 2.2, **{"student.size": size, "lr.peak": rate, "temperature.tau": tau})
    assert sorted(space.axes(sweep.groups())) == ["student.size", "temperature.tau"]


@pytest.mark.parametrize(("values", "kind"), [((0.05, 0.5, 10.0), "log"), ((1.0, 2.0, 8.0), "linear")])
def test_line_over_a_numeric_axis_has_means_intervals_and_the_baseline(sweep, values, kind):
    losses = {tau: [2.3 + shift, 2.31 - shift, 2.32] for tau, shift in zip(values, (0.02, 0.0, 0.05))}
    sweep.losses(lm=[2.5, 2.4, 2.6])
    for tau, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            sweep.done("fkl", seed, loss, **{"temperature.tau": tau})
    (plot,) = space.over(table(sweep))
    line, level = plot.figure.data
    assert list(line.x) == list(values) and list(line.y) == pytest.approx([sum(v) / 3 for v in losses.values()])
    halves = [T2 * statistics.stdev(v) / math.sqrt(3) for v in losses.values()]
    assert list(line.error_y.array) == pytest.approx(halves, rel=1e-3)
    assert plot.figure.layout.xaxis.type == kind and plot.figure.layout.xaxis.title.text == "temperature τ"
    assert level.name == compare.ALONE and list(level.y) == pytest.approx([2.5, 2.5])
    low, high = plot.figure.layout.xaxis.range
    assert low < (math.log10(values[0]) if kind == "log" else values[0]) < high


def test_line_says_where_the_loss_is_lowest_and_what_is_as_good(sweep):
    sweep.losses(lm=[2.5, 2.51, 2.52])
    for tau, shift in ((0.5, 0.3), (1.0, 0.1), (2.0, 0.101), (4.0, -0.2)):
        for seed in range(3):
            loss = 2.5 + 0.01 * seed - shift + (0.001 * (seed - 1) if tau == 2.0 else 0)
            sweep.done("fkl", seed, loss, **{"temperature.tau": tau})
    (plot,) = space.over(table(sweep))
    assert plot.says.startswith("Lowest at tau=0.5: 2.2100 ± 0.0248 nats per token; 3 of 4 are better than")
    assert plot.says.endswith("beyond noise, 1 worse.") and "cannot be told apart" not in plot.says
    sweep.done("fkl", 0, 2.2, **{"temperature.tau": 3.0}).done("fkl", 1, 2.22, **{"temperature.tau": 3.0})
    assert "tau=3 cannot be told apart from it" in space.over(table(sweep))[0].says


def test_a_seed_alone_is_no_noise_and_ties_are_looked_for_on_the_line_of_the_lowest(sweep):
    sweep.losses(lm=[2.5, 2.51, 2.52])
    for k in (1, 2, 3, 4):
        sweep.done("akl", 0, 2.6 - 0.01 * k, **{"truncation.k": k})
    for k, by_seed in {1: [2.2, 2.25, 2.3], 2: [2.3, 2.2, 2.25], 3: [2.4, 2.41, 2.42]}.items():
        for seed, loss in enumerate(by_seed):
            sweep.done("fkl", seed, loss, **{"truncation.k": k})
    (plot,) = space.over(table(sweep))
    assert "k=2 cannot be told apart from it" in plot.says and "k=3" not in plot.says
    assert "within noise" not in plot.says and plot.says.endswith("; 4 with 1 seed give no error bar.")


def test_line_over_size_has_a_baseline_of_each_size(sweep):
    for size, loss in (("100k", 2.6), ("200k", 2.5), ("1m", 2.3)):
        sweep.done("lm", 0, loss, **{"student.size": size}).done("fkl", 0, loss - 0.1, **{"student.size": size})
    for line, number in zip(sweep.runs, (100_000, 100_000, 200_000, 200_000, 1_000_000, 1_000_000)):
        path = sweep.root / line["run"] / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"non_embedding": number}))
    (plot,) = space.over(table(sweep))
    line, base = plot.figure.data
    assert list(line.x) == list(base.x) == [1e5, 2e5, 1e6] and list(base.y) == [2.6, 2.5, 2.3]
    assert plot.figure.layout.xaxis.type == "log" and list(plot.figure.layout.xaxis.ticktext) == ["100k", "200k", "1m"]
    assert plot.says.startswith("The difference to language modelling alone goes from −0.1000 at 100k to −0.1000 at 1m")


def test_without_distillation_the_axes_are_those_of_language_modelling(sweep):
    for rate, loss in ((0.001, 2.5), (0.002, 2.4), (0.004, 2.45)):
        sweep.done("lm", 0, loss, **{"lr.peak": rate})
    (plot,) = space.over(table(sweep))
    assert list(plot.figure.data[0].y) == [2.5, 2.4, 2.45] and len(plot.figure.data) == 1
    assert plot.says == "Lowest at lr.peak=0.002: 2.4000 nats per token."


def test_line_over_k_has_what_is_not_truncated_beside_it(sweep):
    sweep.done("fkl", 0, 2.1, truncation="full")
    for k in (1, 10, 100):
        sweep.done("fkl", 0, 2.2 - k / 1e4, **{"truncation": "top_p_k", "truncation.k": k})
    (plot,) = space.over(table(sweep))
    assert [trace.name for trace in plot.figure.data] == ["top_p_k", "full"]
    assert list(plot.figure.data[0].x) == [1, 10, 100] and list(plot.figure.data[1].y) == [2.1, 2.1]


def test_parallel_coordinates_have_a_line_per_row_blue_where_the_loss_is_lowest(sweep):
    sweep.losses(lm=[2.9])
    for loss, nats in (("fkl", 2.3), ("rkl", 2.5)):
        for tau in (1.0, 2.0):
            for peak in (0.5, 0.9):
                sweep.done(loss, 0, nats + 0.01 * tau + 0.1 * peak, **{"temperature.tau": tau, "alpha.peak": peak})
    plot = space.parallel(table(sweep))
    lines = list(plot.figure.data)
    assert len(lines) == 8 and all(len(line.y) == 4 for line in lines)
    lowest, highest = lines[-1], lines[0]  # drawn last, so on top
    assert lowest.line.color == "rgb(59, 120, 216)" and highest.line.color == "rgb(217, 119, 47)"
    assert min(line.y[-1] for line in lines) == lowest.y[-1] and max(line.y[-1] for line in lines) == highest.y[-1]
    heights = [(2.3 + 0.01 * t + 0.1 * p) for t in (1, 2) for p in (0.5, 0.9)]
    share = (heights[1] - heights[0]) / (2.5 + 0.02 + 0.09 - heights[0])
    assert sorted(line.y[-1] for line in lines)[2] == pytest.approx(0.02 + 0.96 * share)
    marks = {a.text for a in plot.figure.layout.annotations}
    assert marks >= {"2.360", "2.485", "2.610", "fkl", "rkl", "0.5", "<b>temperature τ</b>"}
    assert len({round(line.y[0], 9) for line in lines}) == 8  # side by side, none hides another
    assert plot.says.startswith("All of the 2 lowest of 8 have fkl and alpha.peak=0.5; the lowest is fkl tau=1 alpha")


def test_parallel_coordinates_need_three_axes(sweep):
    assert space.parallel(table(crossed(sweep, GAINS))) is None


def test_schedules_are_drawn_as_configured(sweep):
    sweep.done("lm", 0, 2.5, **COSINE).done("lm", 0, 2.51, **CONSTANT)
    sweep.done("fkl", 0, 2.4, **COSINE, **RISING).done("fkl", 0, 2.3, **CONSTANT, **FALLING)
    plots = {plot.title: plot for plot in shapes.drawn(table(sweep))}
    assert set(plots) == {"alpha=linear_increasing", "alpha=linear_decreasing", "lr=cosine", "lr=constant"}
    want = {
        "alpha=linear_increasing": lambda x: x, "alpha=linear_decreasing": lambda x: 1 - 0.8 * x,
        "lr=cosine": lambda x: 0.001 * (1 + math.cos(math.pi * x)), "lr=constant": lambda x: 0.001,
    }  # fmt: skip
    for title, formula in want.items():
        (line,) = plots[title].figure.data
        assert list(line.y) == pytest.approx([formula(x) for x in line.x]) and 0 < line.x[0] < line.x[-1] < 1
    assert plots["alpha=linear_decreasing"].says.startswith("Mean over the run 0.6; lowest loss with it 2.3000 (")
    assert plots["lr=cosine"].figure.layout.yaxis.range == plots["lr=constant"].figure.layout.yaxis.range


@pytest.mark.parametrize("alpha", [{"alpha": EVIL}, {"alpha": "_warm"}, {"alpha": "wsd", "alpha.peak": "x"}])
def test_a_schedule_that_is_not_known_is_said_and_not_drawn(sweep, alpha):
    sweep.done("fkl", 0, 2.4, **RISING).done("fkl", 0, 2.3, **alpha)
    plots = {plot.title: plot for plot in shapes.drawn(table(sweep))}
    assert not plots[f"alpha={alpha['alpha']}"].figure.data
    assert "1 not drawn: this version has no such schedule" in plots[f"alpha={alpha['alpha']}"].says


def test_no_schedules_where_none_vary(sweep):
    assert not shapes.drawn(table(sweep.losses(lm=[2.5], fkl=[2.4])))
    # One kind of schedule at two peaks: that is no other schedule.
    assert not shapes.drawn(table(sweep.done("rkl", 0, 2.4, **{"alpha.peak": 0.5})))


def read(sweep, kind):
    return (sweep.root / "sweeps" / f"{sweep.name}.{kind}").read_text()


def outside(markdown):
    """The HTML that a renderer of Markdown makes of it, without code blocks, where nothing is markup."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    return re.sub(r"<pre>.*?</pre>", "", html, flags=re.S)


def test_markdown_has_the_numbers_of_the_page(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.36, 2.30, 2.31], rkl=[2.48, 2.52, 2.43])
    sweep.add(["loss=mse", "seed=1"], {"state.json": json.dumps({"state": "failed", "reason": "out of luck"})})
    page, says = sweep.page()
    html = outside(read(sweep, "md"))
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)][1:]
    assert [row[0] for row in found] == ["fkl", compare.ALONE, "rkl", "teacher 1m"]
    for row in found[:-1]:
        assert [c.replace("(", "").replace(")", "") for c in row] == cells(page, row[0])
    assert found[-1][:2] == ["teacher 1m", f"{TEACHER:.4f}"]
    assert f"<strong>{says}</strong>" in html and "loss=mse seed=1: failed, out of luck" in html
    assert "```sh\npython train.py loss=lm seed=0\n" in read(sweep, "md")


def test_csv_has_a_line_per_run_with_what_was_measured(sweep):
    sweep.losses(lm=[2.50, 2.47])
    for seed, loss in enumerate((2.36, 2.31)):
        sweep.done("fkl", seed, loss, **{"temperature.tau": 2.0})
    sweep.done("fkl", 0, 2.4)
    words = ["student=1m", "temperature.tau=4", "seed=7"]
    sweep.add(words, {"state.json": json.dumps({"state": "diverged", "reason": "not finite"})}).page()
    lines = list(csv.DictReader(read(sweep, "csv").splitlines()))
    assert [line["state"] for line in lines] == ["done"] * 5 + ["diverged"]
    assert [line["temperature.tau"] for line in lines] == ["", "", "2.0", "2.0", "1.0", "4"]
    assert [line["logits"] for line in lines[:3]] == ["none", "none", "online"] and "loss" not in lines[0]
    assert [line["seed"] for line in lines] == ["0", "1", "0", "1", "0", "7"]
    assert [float(line["val/lm"]) for line in lines[:5]] == [2.50, 2.47, 2.36, 2.31, 2.4]
    assert [line["difference"] for line in lines[:2]] == ["", ""]
    assert [float(line["difference"]) for line in lines[2:5]] == pytest.approx([-0.14, -0.16, -0.1])
    assert (lines[3]["tokens"], lines[3]["flops"], lines[3]["seconds"]) == ("1228800", "1000000000000.0", "60.0")
    assert float(lines[2]["val/acceptance"]) == 0.75 and float(lines[0]["val/ece"]) == 0.0321
    assert lines[5]["reason"] == "not finite" and lines[5]["val/lm"] == ""
    assert lines[5]["command"] == "python train.py student=1m temperature.tau=4 seed=7"


def test_nothing_that_a_file_says_is_markup(sweep):
    sweep.losses(lm=[2.5, 2.6])
    for seed in (0, 1):
        for alpha in (EVIL, "wsd", "b"):
            for tau in (1.0, 2.0, 4.0):
                for size in (EVIL, "1m"):
                    more = {"alpha": alpha, "temperature.tau": tau, "student.size": size, "data.name": EVIL}
                    sweep.done("fkl", seed, 2.3 + seed + tau / 9, git=EVIL, **more)
    sweep.add([f"loss={EVIL}", "a=\n```\n<img src=x>"], {"state.json": json.dumps({"state": "failed", "reason": EVIL})})
    page, _ = sweep.page()
    assert "All axes at once" in page and "Schedules" in page
    assert "<img" not in page and page.count("<script") == page.count("</script>")
    text, _, commands = read(sweep, "md").partition("<details>")
    assert "<" not in text and commands.count("\n```") == 2  # one line for each command, so that none ends the block
    html = outside(read(sweep, "md"))
    assert "<img" not in html and "<a " not in html and "<em>" not in html and "&lt;img src=x" in html


@pytest.mark.parametrize("kind", ["two", "one"])
def test_names_in_plots_of_few_axes_are_no_markup(sweep, kind):
    for alpha in (EVIL, "b") if kind == "two" else ("b",):
        for tau in (1.0, 2.0, 4.0):
            sweep.done("fkl", 0, 2.3, **{"alpha": alpha, "temperature.tau": tau})
    if kind == "one":
        sweep.done("fkl", 0, 2.3, temperature=EVIL, **{"temperature.tau": None, "alpha": "b"})
    for plot in filter(None, [space.heat(table(sweep)), *space.over(table(sweep)), *shapes.drawn(table(sweep))]):
        text = plot.figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        assert "<img" not in text and (kind == "one" or "&lt;img" in text or plot.title.startswith("alpha="))


@pytest.mark.parametrize("start", ["=cmd|' /C calc'!A0", "+1", "-1", "@x"])
def test_no_cell_is_a_formula(sweep, start):
    sweep.losses(lm=[2.5]).done(start, 0, 2.4).done("fkl", 0, 2.3).page()
    lines = list(csv.DictReader(read(sweep, "csv").splitlines()))
    assert [line["loss"] for line in lines] == ["", f"'{start}", "fkl"]
    assert export.text(-0.5) == -0.5


def test_all_three_files_go_to_a_url(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    sweep.losses(lm=[2.5], fkl=[2.3]).page()
    for path in (sweep.root / "sweeps").glob("s.[!j]*"):
        path.unlink()
    report.write(f"file://{sweep.root}", "s")
    assert sorted(p.name for p in (sweep.root / "sweeps").iterdir()) == ["s.csv", "s.html", "s.json", "s.md"]


def test_question_and_answer_of_a_sweep_of_ours_stand_under_its_title(tmp_path):
    page, _ = Sweep(tmp_path, "schedule").losses(lm=[2.5], fkl=[2.4]).page()
    assert "When to distil?" in page and "Answers to: table 5 of Peng et al. 2024, arXiv 2410.16215: WSD" in page
    assert "a period +0.9 %.</p>" in page
    assert "Answers to: table 5 of Peng et al. 2024" in (tmp_path / "sweeps" / "schedule.md").read_text()
    assert report.answers_to("nothing") == report.question("nothing") == ""
