"""The command that fits laws, and its page."""

import csv
import json
import re

import pytest
from plotly.offline import get_plotlyjs

from sweeps.fit.__main__ import main
from sweeps.fit.fitting import fit_all
from sweeps.fit.observations import to_csv
from sweeps.fit.page import fit_page
from tests.small import here
from tests.sweeps.fake import Sweep
from tests.sweeps.planted import ALONE, finished, planted


def test_command_writes_page_numbers_and_points(tmp_path, capsys):
    sweep = finished(Sweep(tmp_path, "s"), planted(0.001))
    sweep.page()  # writes the manifest
    assert main(["s", "--root", str(tmp_path), "--bootstrap", "5"]) == 0
    out = capsys.readouterr().out
    assert "supervised law" in out and "distillation law" in out and "known: 1.7000" in out
    assert out.strip().splitlines()[-1].startswith(f"{tmp_path / 'sweeps' / 's.fit.html'}: the irreducible loss")
    page = (tmp_path / "sweeps" / "s.fit.html").read_text().replace(get_plotlyjs(), "")
    for part in ("agreement", "isoflop", "students", "winners", "power-tokens", "power-parameters", "power-compute"):
        assert f'id="{part}"' in page
    assert not re.search(r"<(script|img|iframe|source)[^>]+src=|<link|@import|url\(|https?://", page)
    numbers = json.loads((tmp_path / "sweeps" / "s.fit.json").read_text())
    first = numbers["fits"][0]
    assert page.count("held out</small>") == sum(len(fit["held_out"]["runs"]) for fit in numbers["fits"][:2]) > 0
    assert first["law"] == "supervised" and set(first["coefficients"]) == set(ALONE) and first["held_out"]["runs"]
    assert numbers["distillation_wins"] and numbers["entropy"] == 1.7
    with open(tmp_path / "sweeps" / "s.points.csv") as file:
        assert len(list(csv.DictReader(file))) == len(sweep.runs)


def test_command_without_teachers_or_with_nothing(tmp_path, capsys):
    path = tmp_path / "p.csv"
    to_csv(path, planted(0.001, distilled=False))
    assert main(["--csv", str(path), "--bootstrap", "0"]) == 0
    out = capsys.readouterr().out
    assert "The distillation law cannot be fitted: no run learns from a teacher" in out
    page = (tmp_path / "p.fit.html").read_text()
    assert 'id="isoflop"' in page and 'id="winners"' not in page
    path.write_text("parameters,tokens,loss\n")
    assert main(["--csv", str(path)]) == 2 and "p has no run that can be used" in capsys.readouterr().err
    assert main(["none", "--root", str(tmp_path)]) == 2
    assert "sweeps=none does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_runs_that_allow_no_fit_are_refused_once_with_what_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KD_ROOT", str(tmp_path))
    finished(Sweep(tmp_path, "s"), planted(0.001)[:2]).add(["seed=9"], {}).page()
    capsys.readouterr()
    assert main(["s"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and not list(tmp_path.glob("sweeps/s.fit.*"))
    assert printed.err.startswith("s has no runs that a law can be fitted to:\n- The supervised law cannot be fitted")
    assert printed.err.count("at least 7 settings") == 1 and "1 of 3 runs is not done" in printed.err
    assert printed.err.endswith("type e.g. python train.py sweeps=scaling.\n")


def test_nothing_is_injected(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    some = [p._replace(run=evil, teacher=evil if p.teacher == "large" else p.teacher) for p in planted(0.001)]
    page = fit_page(fit_all("s", some, [evil], 0, 0), "x").replace(get_plotlyjs(), "")
    assert "<img" not in page and page.count("<script") == page.count("</script>")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_irreducible_loss_of_a_markov_chain_is_its_entropy(tmp_path):
    # Rows enough that all text is new, held-out text enough that its own loss is near the entropy, and no run so short
    # that it has not yet found out that the text is a chain: before that, loss follows no power of the tokens.
    common = "teacher=none logits=none data.size=1200000 data.tokens=450000 data.val_share=0.2 data.val_rows=4000 "
    common += "trainer.batch=16 trainer.micro_batch=16 trainer.val_every=1000 trainer.checkpoint_every=1000"
    runs = []
    for size in ("100k", "200k"):
        for steps in (100, 200, 400, 800):
            words = [*common.split(), f"student={size}", f"trainer.steps={steps}"]
            runs.append({"run": here(tmp_path, *words).name, "overrides": words})
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "markov.json").write_text(json.dumps({"name": "markov", "runs": runs}))
    assert main(["markov", "--root", str(tmp_path), "--bootstrap", "50"]) == 0
    numbers = json.loads((tmp_path / "sweeps" / "markov.fit.json").read_text())
    coefficient = numbers["fits"][0]["coefficients"]["E"]
    low, high = coefficient["interval"]
    assert coefficient["value"] == pytest.approx(numbers["entropy"], rel=0.01)
    assert 0.995 * low < numbers["entropy"] < 1.005 * high
    assert not any("more than once" in note for note in numbers["notes"])
