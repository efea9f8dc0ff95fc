"""Reports as Markdown and CSV: the numbers of the page, and no markup of their own."""

import csv
import json
import re

import pytest
from markdown_it import MarkdownIt

from sweeps.report.csv_table import safe_cell
from sweeps.report.groups import SUPERVISED
from sweeps.report.question import papers_answer, question
from sweeps.report.report import build_report
from sweeps.report.write import write_report
from tests.sweeps.fake import EVIL, TEACHER, Sweep, cells


def outside(markdown):
    """The HTML that a renderer of Markdown makes of it, without code blocks, where nothing is markup."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    return re.sub(r"<pre>.*?</pre>", "", html, flags=re.S)


def test_markdown_has_the_numbers_of_the_page(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.36, 2.30, 2.31], rkl=[2.48, 2.52, 2.43])
    sweep.add(["loss=mse", "seed=1"], {"state.json": json.dumps({"state": "failed", "reason": "out of luck"})})
    page = sweep.page()
    html = outside(sweep.file("md"))
    cells_by_row = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)][1:]
    assert [row[0] for row in cells_by_row] == ["fkl", SUPERVISED, "rkl", "teacher 1m"]
    for row in cells_by_row[:-1]:
        assert [c.replace("(", "").replace(")", "") for c in row] == cells(page, row[0])
    assert cells_by_row[-1][:2] == ["teacher 1m", f"{TEACHER:.4f}"]
    assert f"<strong>{sweep.report().verdict}</strong>" in html and "loss=mse seed=1: failed, out of luck" in html
    assert "```sh\npython train.py loss=lm seed=0\n" in sweep.file("md")


def test_csv_has_a_line_per_run_with_what_was_measured(sweep):
    sweep.losses(lm=[2.50, 2.47])
    for seed, loss in enumerate((2.36, 2.31)):
        sweep.done("fkl", seed, loss, **{"temperature.tau": 2.0})
    sweep.done("fkl", 0, 2.4)
    words = ["student=1m", "temperature.tau=4", "seed=7"]
    sweep.add(words, {"state.json": json.dumps({"state": "diverged", "reason": "not finite"})}).page()
    lines = list(csv.DictReader(sweep.file("csv").splitlines()))
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
    page = sweep.page()
    assert "Schedules" in page
    assert "<img" not in page and page.count("<script") == page.count("</script>")
    text, _, commands = sweep.file("md").partition("<details>")
    assert "<" not in text and commands.count("\n```") == 2  # one line for each command, so that none ends the block
    html = outside(sweep.file("md"))
    assert "<img" not in html and "<a " not in html and "<em>" not in html and "&lt;img src=x" in html


@pytest.mark.parametrize("start", ["=cmd|' /C calc'!A0", "+1", "-1", "@x"])
def test_no_cell_is_a_formula(sweep, start):
    sweep.losses(lm=[2.5]).done(start, 0, 2.4).done("fkl", 0, 2.3).page()
    lines = list(csv.DictReader(sweep.file("csv").splitlines()))
    assert [line["loss"] for line in lines] == ["", f"'{start}", "fkl"]
    assert safe_cell(-0.5) == -0.5


def test_all_three_files_go_to_a_url(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    sweep.losses(lm=[2.5], fkl=[2.3]).page()
    for path in (sweep.root / "sweeps").glob("s.[!j]*"):
        path.unlink()
    root = f"file://{sweep.root}"
    write_report(root, build_report(root, "s"))
    assert sorted(p.name for p in (sweep.root / "sweeps").iterdir()) == ["s.csv", "s.html", "s.json", "s.md"]


def test_question_and_answer_of_a_sweep_of_ours_stand_under_its_title(tmp_path):
    page = Sweep(tmp_path, "schedule").losses(lm=[2.5], fkl=[2.4]).page()
    assert "When to distil?" in page and "Answers to: table 5 of Peng et al. 2024, arXiv 2410.16215: WSD" in page
    assert "a period +0.9 %.</p>" in page
    assert "Answers to: table 5 of Peng et al. 2024" in (tmp_path / "sweeps" / "schedule.md").read_text()
    assert papers_answer("nothing") == question("nothing") == ""
