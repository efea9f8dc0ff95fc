"""Names of programs as a person types them: by its console script, or by Python in a checkout."""

import runpy
import sys
import tomllib
from importlib.util import find_spec

import pytest
import yaml

from kd.system import programs
from kd.system.programs import root_as_switch, root_as_word
from tests.small import TRAIN


def test_a_command_is_typed_by_python_in_a_checkout_and_by_its_script_elsewhere(monkeypatch, tmp_path):
    assert programs.command("train") == "python train.py" and programs.command("store") == "python -m kd.store"
    monkeypatch.setattr(programs, "PACKAGE", tmp_path)
    (tmp_path / "conf").mkdir()  # as in a wheel
    assert programs.command("train") == "kd-train" and programs.command("report") == "kd-report"


def test_every_program_has_a_script_and_every_script_a_program():
    scripts = tomllib.loads((TRAIN.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"kd-{name}": f"kd.system.programs:{name}" for name in ("train", *programs.MODULES)}
    assert all(callable(getattr(programs, name)) for name in ("train", *programs.MODULES))
    assert programs.TRAIN == TRAIN and all(find_spec(module) for module in programs.MODULES.values())


@pytest.mark.parametrize("name", ["store", "runs", "report"])
def test_a_script_is_its_module_and_says_its_name(name, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(programs, "_by_script", False)
    monkeypatch.delitem(sys.modules, f"{programs.MODULES[name]}.__main__", raising=False)
    real = runpy.run_module
    monkeypatch.setattr(
        runpy, "run_module", lambda module, **options: (started.append(module), real(module, **options))
    )
    monkeypatch.setattr(sys, "argv", [f"/bin/kd-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(programs, name)()
    assert ended.value.code == 0 and started == [programs.MODULES[name]]
    assert f"usage: kd-{name} " in capsys.readouterr().out


def test_hooks_before_a_commit_are_checks_of_make_lint():
    (repository,) = yaml.safe_load((TRAIN.parent / ".pre-commit-config.yaml").read_text())["repos"]
    programs_of = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    lint = (TRAIN.parent / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert len(programs_of) == 3 and all(f"$(BIN)/{program}" in lint for program in programs_of)


def test_the_root_may_be_typed_as_in_another_program():
    assert root_as_switch(["loss", "root=a b", "--wandb"]) == ["loss", "--root=a b", "--wandb"]
    assert root_as_word(["list", "--root", "a b", "x"]) == ["list", "root=a b", "x"]
    assert root_as_word(["list", "--root=a", "-x--root=b", "--roots=c"]) == [
        "list",
        "root=a",
        "-x--root=b",
        "--roots=c",
    ]
    assert root_as_word(["list", "--root"]) == ["list", "--root"] and root_as_word([]) == []
