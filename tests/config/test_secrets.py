"""No text steers a terminal, and secrets get into no file."""

import gzip
import io
import json
import re
import subprocess
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from rich.table import Table

from kd.config import components, overrides, security
from kd.launch import command_line
from kd.runs.outcome import Outcome, RunState
from kd.runs.run import Run
from kd.system.console import Terminal, styled
from sweeps.report.__main__ import main as report_main
from tests import small
from tests.config.hostile import SECRET, typed_in
from tests.small import ENVIRONMENT, SMALL, listed, train
from tests.zygote import Forked, start_zygote

CONTROL = "\x1b]0;pwned\x07\x1b[2J\x1b]52;c;cHduZWQ=\x07\x9b31m\u202e\x00\r"


def test_no_text_steers_the_terminal(tmp_path):
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=False, width=200)
    table = Table(title=f"t{CONTROL}")
    table.add_column(f"h{CONTROL}")
    table.add_row(styled(f"{CONTROL}cell", "dim"))
    for thing in (f"a{CONTROL}b", table):
        console.print(thing)
    console.print(f"c{CONTROL}d", markup=False, soft_wrap=True)
    assert all(c.isprintable() or c in "\n" for c in out.getvalue()), ascii(out.getvalue())
    assert "]0;pwned" in out.getvalue() and "cell" in out.getvalue()  # shown, and not obeyed


def test_report_prints_no_control_characters(tmp_path, capsys):
    (tmp_path / "sweeps").mkdir()
    line = {"run": "run-1", "overrides": [f"loss={CONTROL}"]}
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"runs": [line]}))
    Run(tmp_path, "run-1").end(Outcome(RunState.FAILED, CONTROL))
    assert report_main(["s", "--root", str(tmp_path)]) == 2
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().err)


NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SLURM_JWT", "MY_PASSWORD")


def contents(path: Path) -> bytes:
    """Return the bytes of a file, and of everything that is compressed in it."""
    raw = path.read_bytes()
    parts = [raw]
    if raw[:2] == b"\x1f\x8b":
        parts.append(gzip.decompress(raw))
    for start in re.finditer(rb"\x78[\x01\x9c\xda]", raw):
        with suppress(zlib.error):
            parts.append(zlib.decompressobj().decompress(raw[start.start() :]))
    return b"".join(parts)


def test_secrets_of_the_environment_are_in_no_file(tmp_path, monkeypatch):
    root, home = tmp_path / "root", tmp_path / "home"
    root.mkdir()
    home.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    git_config = (root / ".git" / "config").read_bytes()
    subprocess.run([*git, "remote", "add", "origin", f"https://{SECRET}@example.org/x.git"], check=True)
    environment = dict.fromkeys(NAMES, SECRET) | {"SLURM_JOB_ID": "1", "HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:9"}
    environment |= {"HOME": str(home), "WANDB_MODE": "offline", "TMPDIR": str(home)}

    class Loaded(Forked):  # libraries read the environment while they are loaded
        server = start_zygote(ENVIRONMENT | environment)

    monkeypatch.setattr(small, "popen", lambda: Loaded if Loaded.server else subprocess.Popen)
    words = ("teacher=none", "logits=none", "trainer.steps=2")
    diverges = ("lr=constant", "lr.peak=1e30,1e-3", "trainer.clip=0")
    train(root, "-m", *words, *diverges, "logger=wandb", code=1, **environment)
    train(root, *words, "seed=1", "logger=tensorboard", **environment)
    assert sorted(json.loads(p.read_text())["state"] for p in root.glob("*/state.json")) == ["diverged", "done", "done"]
    (root / ".git" / "config").write_bytes(git_config)
    seen = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"log.txt", "config.json", listed(root).name, "state.json"} <= {p.name for p in seen}
    assert any(p.suffix == ".wandb" for p in seen) and any("tfevents" in p.name for p in seen)
    assert [str(p) for p in seen if SECRET.encode() in contents(p)] == []


TYPED = [
    f"+logger.api_key={SECRET}", f"++logger.token={SECRET}", f"sweep={SECRET}", f"logger.project=x{SECRET}",
    "logits.path=s3://me:sesame@bucket/x", "data.name=https://sesame@example.org/x",
    "student.name='https://example.org/x?a=b&token=sesame'", "+a.password=sesame", "data.name=hf_" + "sesame" * 6,
    "root=s3://AKIASESAMESESAME1234/x", "+x=ghp_" + "sesame" * 6,
]  # fmt: skip


@pytest.mark.parametrize("word", TYPED)
@pytest.mark.parametrize("switches", [[], ["-m"]])
def test_secret_that_is_typed_is_refused_and_shown_nowhere(word, switches, canary, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    code, output = typed_in(canary.parent, *switches, "data=markov", f"root={canary.parent}/runs", word)
    assert code == 2 and "there seems to be a secret" in output and "environment" in output, output
    assert "sesame" not in output.lower() and not (canary.parent / "runs").exists()


def test_secret_in_the_path_that_the_environment_gives_is_refused(canary, monkeypatch):
    monkeypatch.setenv("KD_ROOT", "s3://me:sesame@bucket/runs")
    code, output = typed_in(canary.parent, "data=markov", "logger=none")
    assert code == 2 and output.startswith("root: there seems to be a secret") and "sesame" not in output, output


def test_secret_in_a_file_of_a_sweep_is_refused(canary, monkeypatch):
    (canary.parent / "sweeps").mkdir()
    monkeypatch.setattr(components, "SWEEPS", canary.parent / "sweeps")
    command_line.register.cache_clear()  # sweeps are listed once for each process
    (canary.parent / "sweeps" / "mine.yaml").write_text("# What?\nruns:\n- +logger.api_key=sesame\n")
    code, output = typed_in(canary.parent, "sweeps=mine", *SMALL, f"root={canary.parent}/runs")
    assert code == 2 and "logger.api_key: there seems to be a secret" in output and "sesame" not in output, output


@pytest.mark.parametrize(
    "word",
    ["data.tokens=100", "data.tokenizer=gpt2", "data.field=key", "logits.path=s3://bucket/keys",
     "student.name=a/hf_my_model",
     "data.name=hf://datasets/a/b@main", "root=/home/me/secret", "logits.path=sftp://me@host/x", "lr.peak=1e-4",
     "data.files='a/*.txt'", "optim.betas=[0.9,0.95]", "loss=choice(fkl,jsd)", "loss='glob(*)'", "hydra.verbose=true",
     "hydra/launcher=submitit_slurm", "+hydra.launcher.additional_parameters.account=x", "hydra.sweeper.n_trials=3",
     "lr.peak='tag(log,interval(1e-4,1e-2))'", "seed=${trainer.steps}"],
)  # fmt: skip
def test_ordinary_word_is_no_secret_and_not_hostile(word, monkeypatch):
    monkeypatch.setattr(overrides, "check_groups", lambda words: None)  # most ask for an option that has them
    security.check_command_line(["-m", word.replace("'", "") if "(" in word else word])
