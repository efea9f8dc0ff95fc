"""Sections of reports that plug-ins add: shown as text, and named where they fail."""

import re
import sys
from pathlib import Path

import pytest

from kd.config import plugins
from sweeps.report.__main__ import main
from sweeps.report.report import build_report
from sweeps.report.sections import Section
from tests.sweeps.fake import EVIL

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "kd-example"
HEAD = "from sweeps.report.sections import Section, section\n\n@section\n"


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """Return a function that writes an allowed plug-in with this module of sections."""
    monkeypatch.syspath_prepend(tmp_path / "plugged")
    before = set(sys.modules)

    def write(text: str, allowed: str = "plugged_sections") -> Path:
        file = tmp_path / "plugged" / "plugged_sections" / "sections.py"
        file.parent.mkdir(parents=True)
        (file.parent / "__init__.py").write_text("")
        file.write_text(text)
        monkeypatch.setenv(plugins.VARIABLE, allowed)
        return file

    yield write
    for name in set(sys.modules) - before:
        if name.startswith(("plugged_sections", "kd_example")):
            del sys.modules[name]


def test_a_section_is_in_the_page_and_in_the_markdown(sweep, plug):
    body = "def ends(report):\n    rows = ((row.group.label, -0.5, 3, None) for row in report.rows)\n"
    body += '    return Section("Ends", "Of all rows.", ("row", "gap", "n", "none"), rows)\n'
    plug(HEAD + body)
    page = sweep.losses(lm=[2.5], fkl=[2.3]).page()
    assert "<h2>Ends</h2>\n<p>Of all rows.</p>" in page
    assert "<tr><th>row</th><th>gap</th><th>n</th><th>none</th></tr>" in page
    assert "<tr><td>fkl</td><td>−0.5000</td><td>3</td><td>–</td></tr>" in page
    text = sweep.file("md")
    table = "| row | gap | n | none |\n| :-- | --: | --: | --: |\n| fkl | −0.5000 | 3 | – |\n"
    assert f"### Ends\n\nOf all rows.\n\n{table}" in text
    assert "Beware: The section" not in text


def test_no_section_without_permission(sweep, plug):
    plug(HEAD + "def ends(report):\n    raise RuntimeError\n", allowed="")
    report = sweep.losses(lm=[2.5], fkl=[2.3]).report()
    assert report.sections == () and not any("section" in line for line in report.warnings)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def ends(report):\n    return 1 / 0\n", "ZeroDivisionError: division by zero (FILE, line 5)"),
        ("def ends(report):\n    return 'text'\n", "TypeError: it returned a str, and need is a Section or None"),
        ("def ends():\n    return None\n", "TypeError: ends() takes 0 positional arguments but 1 was given"),
        ("def ends(report):\n    return Section('x', '', ('a',), [(1, 2)])\n", "ValueError: a row has 2 cells, and "
         "there are 1 columns (FILE, line 5)"),
        ("def ends(report):\n    return Section('x', '', ('a',), [([],)])\n", "TypeError: a cell is a list"),
        ("def ends(report):\n    return Section(3)\n", "TypeError: title, text and columns of a section are texts"),
        ("def ends(report):\n    return None\n\nraise OSError('gone')\n", "could not be imported: OSError: gone"),
    ],
)  # fmt: skip
def test_a_section_that_fails_is_named_and_loses_nothing(body, reason, sweep, plug, capsys):
    file = plug(HEAD + body + "\n\n@section\ndef good(report):\n    return Section('Good', 'after it')\n")
    sweep.losses(lm=[2.5], fkl=[2.3]).report()
    assert main(["s", "--root", str(sweep.root)]) == 0
    reason, good = reason.replace("FILE", str(file)), "gone" not in reason
    fault = f"The section plugged_sections.sections.ends is missing, since it failed: {'' if good else 'the section='}"
    report = build_report(sweep.root, "s")
    (line, *others) = [line for line in report.warnings if "section" in line]
    assert line.startswith(fault) and reason in line
    assert [section.title for section in report.sections] == (["Good"] if good else []) and bool(others) is not good
    captured = capsys.readouterr()
    assert "fkl: 2.300" in captured.out and reason in captured.err
    assert "is missing, since it failed" in (sweep.root / "sweeps" / "s.html").read_text()
    assert "- Beware: The section plugged_sections.sections.ends is missing" in sweep.file("md")


def test_text_of_a_section_is_no_markup(sweep, plug):
    plug(HEAD + f"def ends(report):\n    evil = {EVIL!r}\n    return Section(evil, evil, (evil,), [(evil,)])\n")
    page = sweep.losses(lm=[2.5], fkl=[2.3]).page()
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") >= 4
    assert "<img" not in sweep.file("md") and "[a](b)" not in sweep.file("md")


def test_a_section_without_a_table_has_its_text_alone(sweep, plug):
    plug(HEAD + "def ends(report):\n    return Section('Ends', 'no table')\n")
    page = sweep.losses(lm=[2.5], fkl=[2.3]).page()
    assert "<h2>Ends</h2>\n<p>no table</p>\n</section>" in page
    assert "### Ends\n\nno table\n\n<details>" in sweep.file("md")


def test_rows_of_a_section_can_be_read_twice():
    section = Section("x", columns=iter(["a"]), rows=([value] for value in (1, 2)))
    assert section.texts == section.texts == [["1"], ["2"]]


def test_the_section_of_the_example(sweep, plug, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv(plugins.VARIABLE, "kd_example")
    for seed in (0, 1):
        for alpha, loss in ((0.5, 2.25), (0.25, 2.5)):
            sweep.done("alpha_divergence", seed, loss, **{"loss.alpha": alpha})
    (section,) = sweep.report().sections
    assert section.texts == [["0.2500", "2.5000", "2"], ["0.5000", "2.2500", "2"]]
    assert section.text.startswith("The lowest loss is that of alpha=0.5.")
    other = type(sweep)(sweep.root, "other").losses(fkl=[2.3])
    assert other.report().sections == ()


def test_the_section_of_the_documentation(sweep, plug):
    page = (EXAMPLE.parent.parent / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"```python\n# mypackage/sections.py\n(.*?)```", page, re.DOTALL)
    plug(code)
    report = sweep.losses(fkl=[2.25, 2.5], rkl=[2.75, 3.0]).report()
    (section,) = report.sections
    assert section.texts == [["fkl", "2.2500", "2.5000"], ["rkl", "2.7500", "3.0000"]]
    assert type(sweep)(sweep.root, "other").losses(fkl=[2.3]).report().sections == ()
