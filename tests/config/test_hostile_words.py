"""Hostile words run nothing, and reach nothing outside."""

import json

import pytest

from kd.config import components, compose, search_path, security
from kd.launch import optuna_search
from kd.system import files
from sweeps.report.__main__ import main as report_main
from tests.config.hostile import WORDS, filled, typed, typed_in, with_evil
from tests.refusals import refused
from tests.small import SMALL, TINY


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, tuple[int | None, str, set[str]]]:
    """Exit code and output of each hostile command line, and the files that it made."""
    homes = {name: filled(with_evil(tmp_path_factory.mktemp("hostile")).parent) for name in WORDS}
    before = {name: set(home.rglob("*")) for name, home in homes.items()}
    usual = ["data=markov", "logger=none", "root=FILE/runs"]
    ends = typed({home: [*usual, *WORDS[name]] for name, home in homes.items()})
    new_files = {n: {str(p.relative_to(home)) for p in {*home.rglob("*")} - before[n]} for n, home in homes.items()}
    return {name: (*ends[home], new_files[name]) for name, home in homes.items()}


@pytest.mark.parametrize("name", WORDS)
def test_hostile_command_line_is_refused_before_anything_is_made(refusals, name):
    code, output, new_files = refusals[name]
    assert code in (1, 2) and "Traceback" not in output, output
    assert new_files == {"output"}


@pytest.mark.parametrize("words", [WORDS[w] for w in ("callback", "option by a path", "logging", "search path")])
def test_the_canary_would_sing(words, hostile, monkeypatch):
    """The words above do what they would if nothing checked them, so that the tests above could fail."""
    monkeypatch.setattr(security, "check_command_line", lambda words: words)
    monkeypatch.setattr(components, "check_targets", lambda node: None)
    monkeypatch.setattr(security, "check_words", lambda words: None)
    monkeypatch.setattr(search_path, "take", lambda words: words)  # so that Hydra reads the folders itself
    typed_in(hostile, "data=markov", "logger=none", "root=FILE/runs", "trainer.steps=0", *words)
    assert (hostile / "canary").exists()
    (hostile / "canary").unlink()


@pytest.mark.parametrize(
    "line", ["target", "callback by interpolation", "option by a path", "environment in a setting"]
)
def test_hostile_line_of_a_sweep_starts_no_run(line, hostile, monkeypatch):
    (hostile / "sweeps").mkdir()
    monkeypatch.setattr(components, "SWEEPS", hostile / "sweeps")
    words = " ".join(f'"{w}"' for w in WORDS[line]).replace("FILE", str(hostile))
    (hostile / "sweeps" / "mine.yaml").write_text(f"# What?\nruns:\n- seed=1\n- '{words}'\n".replace("$", "$"))
    code, output = typed_in(hostile, "sweeps=mine", *SMALL, "root=FILE/runs")
    assert code in (1, 2) and "Traceback" not in output and not list(hostile.glob("runs/*/config.json")), output


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system",
                                 "!!python/object/new:evil.Boom []", "!!python/module:evil"])  # fmt: skip
def test_sweep_with_a_tag_of_yaml_is_refused(tag, canary, monkeypatch):
    (canary.parent / "sweeps").mkdir()
    monkeypatch.setattr(components, "SWEEPS", canary.parent / "sweeps")
    (canary.parent / "sweeps" / "mine.yaml").write_text(f"# What?\nruns:\n- {tag}\n")
    with refused(option=canary.parent / "sweeps" / "mine.yaml", why="is no plain YAML"):
        compose.register()


def test_hostile_words_to_write_a_store_are_refused(hostile):
    for words in (WORDS["target"], WORDS["callback"], WORDS["option by a path"]):
        code, output = typed_in(hostile, "write", *TINY, "root=FILE/runs", *words, program="kd.store")
        assert code == 2 and "Traceback" not in output, output


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/etc", "a/b", "a\\b", "a\nb", "", None, 3])
def test_sweep_that_names_a_run_elsewhere_is_refused(tmp_path, name, capsys):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"runs": [{"run": name, "overrides": []}]}))
    assert report_main(["s", "--root", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/../../x"])
def test_report_of_a_sweep_elsewhere_is_refused(tmp_path, name, capsys):
    assert report_main([name, "--root", str(tmp_path)]) == 2
    assert "no path" in capsys.readouterr().err


def test_words_of_a_search_that_come_from_its_journal_are_checked(hostile):
    import optuna

    (hostile / "runs" / "sweeps").mkdir(parents=True)
    words = [*SMALL, f"root={hostile / 'runs'}"]
    name = f"multirun-{files.digest_of(optuna_search.asked_for([*words, 'seed=1,2']))[:8]}"
    journal = optuna.storages.journal.JournalFileBackend(str(hostile / "runs" / "sweeps" / f"{name}.optuna"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal), study_name=optuna_search.asked_for([*words, "seed=1,2"])
    )
    trial = study.ask()
    trial.suggest_categorical("seed", ["${oc.env:HOME}"])
    code, output = typed_in(hostile, "-m", "hydra/sweeper=optuna", *words, "seed=1,2")
    assert code == 2 and "not to anything outside" in output and "Traceback" not in output, output
