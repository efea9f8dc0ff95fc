"""Sweeps: a process per run, one failure takes no other run with it, the table says what became of each."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from kd.config.components import SWEEPS
from kd.config.overrides import deferred, undeferred
from kd.config.rules import group_of
from kd.config.schema import NO_SIGNAL
from kd.errors import UserError
from kd.experiment.dependencies import Plan
from kd.experiment.results import load_sweep
from kd.launch.job import Job
from kd.launch.local import LocalLauncher
from kd.launch.run_launcher import discard
from kd.launch.summary import refused as refused_runs
from kd.launch.summary import summary, varying
from kd.launch.sweeper import SweepFileSweeper, asked_for, at_scale, without_unused
from kd.models import flops as flops_module
from kd.runs.outcome import classify
from kd.runs.run import Run
from kd.system import files
from kd.system.console import counted
from kd.system.processes import process_info
from kd.teachers.base import TeacherOrigin
from sweeps.report.groups import SUPERVISED, group_runs
from sweeps.report.report import build_report
from sweeps.report.write import write_report
from tests.cases import option
from tests.refusals import refused
from tests.small import ENVIRONMENT, TRAIN, folder, listed, outcome, result, small_config, train


def test_multirun_makes_every_run_and_again_makes_none(tmp_path):
    output = train(tmp_path, "-m", "logits=none,online", "loss=fkl,tvd", "trainer.steps=3")
    manifest = json.loads(listed(tmp_path).read_text())
    # Without a signal the loss is no part of a run: three runs, not four.
    assert len(manifest["runs"]) == 3 and "run 3 of 3" in output
    assert all(result(tmp_path / r["run"])["state"] == "done" for r in manifest["runs"])
    again = train(tmp_path, "-m", "logits=none,online", "loss=fkl,tvd", "trainer.steps=3")
    assert again.count("done before") == 3


@pytest.mark.slow
def test_two_sweeps_without_a_name_keep_a_list_each(tmp_path):
    words = ("logits=none", "teacher=none", "trainer.steps=2")
    train(tmp_path, "-m", *words, "seed=0,1")
    first = listed(tmp_path)
    original = first.read_text()
    output = train(tmp_path, "-m", *words, "seed=1,2")
    second = listed(tmp_path)
    assert first != second and first.read_text() == original and f"sweep {second.stem}" in output
    assert "another command" not in output
    again = train(tmp_path, "-m", *words, "seed=1,2", f"sweep={first.stem}").replace("\n", "")  # which asks for it
    assert f"{first} lists what this command makes" in again and "1 are of another command" in again


def test_the_words_of_a_sweep_name_it_whatever_their_order():
    words = ["seed=0,1", "loss=fkl", "n_jobs=2", "force=true", "root=/x", "logger=none"]
    assert asked_for(words) == asked_for(["loss=fkl", "seed=0,1"]) != asked_for(["loss=fkl", "seed=0,2"])


@pytest.mark.parametrize("words", [("start=scratch", "start=sft"), ("start.sft_steps=5", "start.sft_steps=6"),
                                   ("plain=python", "plain=text"), ("logits.path=a", "logits.path=b")])  # fmt: skip
def test_words_that_make_other_runs_name_another_sweep(words):
    one, two = (asked_for(["loss=fkl,rkl", word]) for word in words)
    assert one != two


def test_a_damaged_teacher_is_said_before_any_run_starts(tmp_path):
    planned = Plan.from_config(small_config(tmp_path, "student=100k"))
    teacher = Plan.from_config(planned.teacher).run
    LocalLauncher().check_before(planned, set())  # it is not there yet
    teacher.folder.mkdir(parents=True)
    (teacher / "result.json").write_text("{")
    with refused(option=teacher.folder / "result.json", why="is damaged"):
        LocalLauncher().check_before(planned, set())
    LocalLauncher().check_before(planned, {files.digest_of(planned.teacher.to_dict())})


def test_one_run_is_said_to_be_one():
    assert [counted(n, "run is", "runs are") for n in (0, 1, 2000)] == ["0 runs are", "1 run is", "2,000 runs are"]


def test_a_copy_removes_no_result_while_another_one_is_at_work(tmp_path):
    done, begun = Run(tmp_path, "done"), Run(tmp_path, "begun")
    for run in (done, begun):
        assert run.claim.take()
        run.claim.release()
    (done / "result.json").write_text("{}")
    (begun / "claim.lock").write_text(json.dumps(process_info() | {"pid": os.getppid()}))
    with refused(option="force", got=True, why="another copy of this sweep works on begun", hint="without force=true"):
        discard([done, begun])
    assert done.is_done() and not (done / "claim.lock").exists() and (begun / "claim.lock").exists()
    (begun / "claim.lock").unlink()
    discard([done, begun])
    assert not done.is_done() and not list(tmp_path.rglob("claim.lock"))


def test_run_in_a_sweep_equals_the_run_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train(tmp_path / "a", "-m", "loss=rkl,fkl", "trainer.steps=3", cold=True)
    train(tmp_path / "b", "loss=fkl", "trainer.steps=3")
    assert outcome(folder(tmp_path / "a", "fkl")) == outcome(folder(tmp_path / "b", "fkl"))


def test_one_failed_run_leaves_the_others_and_the_exit_code_says_so(tmp_path):
    output = train(tmp_path, "-m", "lr=constant", "lr.peak=1e30,1e-3", "trainer.clip=0", "trainer.steps=4", code=1)
    states = [line.split()[1] for line in output.splitlines() if line.startswith("lr.peak=")]
    assert states == ["diverged", "done"]
    assert "not finite" in output


def test_wrong_config_stops_a_sweep_before_its_first_run(tmp_path):
    output = train(tmp_path, "-m", "truncation=top_k", "truncation.k=5,abc", code=2)
    assert "truncation.k=abc" in output and not list(tmp_path.glob("fkl*"))


@pytest.mark.parametrize("words", [(), ("-m", "seed=0,1")])
def test_a_root_that_is_no_folder_is_said_with_what_to_type(tmp_path, words):
    (tmp_path / "file").touch()
    output = train(tmp_path, *words, f"root={tmp_path / 'file'}", code=2)
    assert f"{tmp_path}/file" in output and "root=/other/folder" in output and "Traceback" not in output


def test_sweep_file_is_a_union_of_lines_with_what_was_typed_added(tmp_path):
    output = train(tmp_path, "sweeps=demo", "trainer.steps=2", "temperature.tau=2")
    manifest = json.loads((tmp_path / "sweeps" / "demo.json").read_text())
    losses = [next((w for w in r["overrides"] if w.startswith("loss=")), "none") for r in manifest["runs"]]
    assert losses.count("none") == 1 and len(losses) == 4, output
    assert not any("tau" in w for r in manifest["runs"] if "logits=none" in r["overrides"] for w in r["overrides"])


def test_scale_adds_its_words_and_lines():
    scales = {"cpu": {"base": "data=python", "runs": ["student=100k"]}, "full": {"base": "trainer.batch=256"}}
    sweep = {"base": "seed=0,1", "runs": ["logits=none"], "scales": scales}
    assert at_scale(sweep, "cpu") == ("seed=0,1 data=python", [("", "logits=none"), ("", "student=100k")])
    assert at_scale(sweep, "full") == ("seed=0,1 trainer.batch=256", [("", "logits=none")])
    assert at_scale({"runs": [""]}, "cpu")[1] == [("", "")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("run: [loss=fkl]", "has a key run,"),
        ("", "has no runs"),
        ("scales: {cpu: {base: seed=0}}", "has no runs"),
        ("runs: loss=fkl", "its runs are no list: loss=fkl"),
        ("runs: [seed: 0]", "is no text"),
        ("{base: [seed=0], runs: [loss=fkl]}", "its base is no text"),
    ],
)
def test_a_sweep_file_of_another_form_is_refused_with_its_name(tmp_path, text, why):
    file = tmp_path / "conf" / "sweeps" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    output = train(tmp_path, "sweeps=mine", f"--config-dir={tmp_path / 'conf'}", code=2)
    assert f"{file}" in output.replace("\n", "") and why in output and "runs (a list of lines)" in output


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "{base: seed=0, runs: [loss fkl]}",
            "its words 'seed=0 loss fkl' are wrong: loss is no setting without =VALUE",
        ),
        ("runs: [loss: fkl]", "its words 'fkl' are wrong: fkl is no setting: it has no ="),
        ("runs: ['loss={fkl']", "its words 'loss={fkl' are wrong: loss={fkl cannot be read"),
    ],
)
def test_a_wrong_word_of_a_sweep_file_is_named_with_what_to_type(text, why, monkeypatch, capsys):
    sweeper = SweepFileSweeper()
    sweep = yaml.safe_load(text) | {"name": "mine"}
    sweeper.config = OmegaConf.create({"sweep": sweep, "scale": "cpu"})
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    with pytest.raises(SystemExit, match="2"):
        sweeper.sweep(["sweeps=mine"])
    message = " ".join(capsys.readouterr().err.split())
    assert f"{why}; need NAME=VALUE. Type loss=fkl." in message


def test_a_line_has_a_name():
    assert at_scale({"runs": [{"plain": "logits=none"}]}, "cpu")[1] == [("plain", "logits=none")]
    jobs = [["seed=0", "a=1"], ["seed=1", "a=1"], ["seed=0", "a=2"], ["seed=0", "a=1", "b=1"]]
    assert varying(jobs, ["A", "A", "B", ""]) == ["A seed=0", "A seed=1", "B", "seed=0 a=1 b=1"]


def test_only_commands_are_indented_where_some_runs_cannot_be_made():
    reason = str(UserError(option="/data", why="is damaged", hint="type", commands=["rm -r /data"]))
    text = refused_runs([["seed=0"], ["seed=1"]], ["seed=0", "seed=1"], {0: reason})
    assert [line for line in text.splitlines() if line.startswith(" ")] == ["  rm -r /data"]
    assert "- seed=0: /data is damaged" in text and text.endswith("type seed=1.")


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("place", ["run/checkpoints/step-00000003.ckpt", "data/1234/train.npy"])
def test_table_shows_the_cause_behind_a_long_path(tmp_path, monkeypatch, place, url):
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    root = f"file://{tmp_path}/there" + "/folder" * 20 if url else tmp_path / ("folder/" * 20)
    run = Run(root, "run")
    run.folder.mkdir(parents=True)
    (run / "log.txt").touch()
    try:
        path = run.folder.parent / place
        path.parent.mkdir(parents=True, exist_ok=True)
        raise files.disk_full(path)
    except UserError as error:
        failure = classify(error)
    files.write_json(run / "state.json", failure.to_json())
    table = Console(file=io.StringIO(), width=2000)
    table.print(summary("s", [Job(run, [], "seed=0")]))
    short = place.removeprefix("run/")
    assert f" {short} could not be written, as the disk is full" in table.file.getvalue()


@pytest.mark.slow
def test_runs_of_a_line_go_by_its_name(tmp_path):
    output = train(tmp_path, "sweeps=best", "seed=0", "student=200k", "data.states=128", "trainer.steps=2")
    runs = json.loads((tmp_path / "sweeps" / "best.json").read_text())["runs"]
    names = [run.get("name") for run in runs]
    assert (
        names == [None, "plain distillation", "best of all", "best of all at a temperature of 1"]
        and "  best of all  starts" in output
    )
    groups = group_runs(load_sweep(tmp_path, "best"))
    assert {group.label for group in groups} == {SUPERVISED, *names[1:]}


def test_wrong_scale_names_those_there_are(tmp_path):
    output = train(tmp_path, "sweeps=scaling", "scale=huge", code=2)
    assert "scale=huge: need a scale of this sweep, cpu or full" in output
    assert "scale=full: need a scale of this sweep, cpu" in train(tmp_path, "sweeps=demo", "scale=full", code=2)
    assert "only a sweep has scales" in train(tmp_path, "scale=full", code=2)


NAMED = ["teacher=hub", "teacher.name=org/big"]


@pytest.mark.parametrize("typed", [[], ["teacher.steps=choice(5)"]])
@pytest.mark.parametrize(
    "untrained",
    [
        NAMED,
        ["experiment=c4_330m"],
        [*NAMED, "teacher.sft=false"],
        ["teacher=none", "logits=none"],
        ["logits=cotrained"],
        ["teacher=3m", "logits=cotrained"],
    ],
)
@pytest.mark.parametrize(
    "trained",
    [
        ["teacher=100k"],
        ["seed=1"],
        ["experiment=c4_100m"],
        [*NAMED, "teacher.sft=True"],
        ["teacher=hub", "teacher.name=null", "teacher.size=1m"],
        ["experiment=c4_330m", "teacher=1b", "teacher.name=null"],
    ],
)
def test_settings_of_a_teachers_training_are_left_out_of_runs_that_train_none(typed, untrained, trained):
    jobs = [[*words, "teacher.steps=5", "trainer.steps=3"] for words in (trained, untrained)]
    assert without_unused(jobs, typed) == [jobs[0], [*untrained, "trainer.steps=3"]]


@pytest.mark.parametrize(
    ("words", "is_used"),
    [
        (["teacher=1m"], True), (["teacher=1m", "logits=cotrained"], True), (["teacher=none", "logits=none"], False),
        (NAMED, False), ([*NAMED, "rollout=teacher"], True), ([*NAMED, "teacher.sft=true"], True),
    ],
)  # fmt: skip
def test_the_seed_of_a_teacher_is_left_out_where_nothing_is_drawn_with_it(words, is_used):
    jobs = [[*words, "teacher.seed=1"], ["teacher=1m", "teacher.seed=1"]]
    assert without_unused(jobs, ["teacher.seed=1"])[0] == [*words, "teacher.seed=1"][: len(words) + is_used]


def test_a_typed_setting_of_a_signal_without_an_effect_in_any_run_is_not_left_out():
    jobs = [["logits=none", f"seed={seed}", "loss=akl", "alpha.peak=1"] for seed in (0, 1)]
    assert without_unused(jobs, ["loss=akl"]) == [job[:-1] for job in jobs]
    assert without_unused([*jobs, ["loss=akl"]], ["loss=akl"]) == [*[job[:2] for job in jobs], ["loss=akl"]]


def test_a_typed_setting_of_a_teachers_training_without_an_effect_in_any_run_is_not_left_out():
    jobs = [[f"seed={seed}", *NAMED, "teacher.lr=1", "teacher.steps=5"] for seed in (0, 1)]
    assert without_unused(jobs, ["teacher.lr=choice(1)"]) == [job[:-1] for job in jobs]


def jobs(sweep: dict, scale: str = "cpu") -> set[tuple[str, ...]]:
    """The runs of a sweep, multiplied out."""
    base, lines = at_scale(sweep, scale)
    distinct = set()
    for _, line in lines:
        words = dict(word.split("=", 1) for word in f"{base} {line}".split())
        for values in itertools.product(*(value.split(",") for value in words.values())):
            job = dict(zip(words, values, strict=True))
            alone = job.get("logits") == "none"
            distinct.add(tuple(sorted((k, v) for k, v in job.items() if not (alone and group_of(k) in NO_SIGNAL))))
    return distinct


@pytest.mark.parametrize("name", sorted(p.stem for p in SWEEPS.glob("*.yaml")))
def test_every_sweep_file_says_its_question(name):
    path = SWEEPS / f"{name}.yaml"
    head = path.read_text().splitlines()[0]
    assert head.startswith("# ") and "?" in head
    assert f"({len(jobs(OmegaConf.to_container(OmegaConf.load(path))))} runs" in head


TINY = ["seed=0", "teacher.steps=2", "data.tokens=20000", "data.val_rows=4", "logger=none", "n_jobs=2"]
SHORT = {  # what makes the runs of a sweep short; trainer.steps=2 for the others
    "corpus_size": "trainer.tokens=1000",
    "minillm": "trainer.steps=2 trainer.batch=2 start=sft start.steps=2 start.sft_steps=2 responses.samples=1",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder in which the data is packed once."""
    return tmp_path_factory.mktemp("sweeps")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in SWEEPS.glob("*.yaml")))
def test_a_tiny_version_of_every_sweep_runs_and_is_reported(name, shared):
    words = [f"sweeps={name}", f"root={shared}", *TINY, *SHORT.get(name, "trainer.steps=2").split()]
    done = subprocess.run([sys.executable, TRAIN, *words], env=ENVIRONMENT, cwd=shared, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = build_report(shared, name)
    assert sum(len(group.runs) for group in report.groups) == len(report.entries) > 1
    assert report.verdict and all(path.exists() for path in write_report(shared, report))


@pytest.mark.slow
def test_words_that_describe_one_run_are_one_run(tmp_path):
    words = ("temperature.tau=1,1.0", "trainer.checkpoint_every=3,6", "teacher.steps=2", "trainer.steps=2", "n_jobs=2")
    output = train(tmp_path, "-m", *words)
    assert output.count("starts") == 1 and "run 1 of 1" in output
    assert len(json.loads(listed(tmp_path).read_text())["runs"]) == 1


@pytest.mark.slow
def test_what_a_kill_after_the_result_left_is_done_by_the_same_command(tmp_path):
    words = ("logits=none", "teacher=none", "trainer.steps=2")
    train(tmp_path, *words)
    run = folder(tmp_path, "lm")
    clean = json.loads((run / "state.json").read_text())
    for command in (words, ("-m", *words)):
        (run / "checkpoints").mkdir()
        (run / "state.json").write_text(json.dumps(clean | {"state": "running"}))
        train(tmp_path, *command)
        assert json.loads((run / "state.json").read_text())["state"] == "done" and not (run / "checkpoints").exists()


def test_all_runs_that_cannot_be_made_are_named_with_what_to_type_for_the_others():
    jobs = [[f"loss={loss}", f"seed={seed}"] for loss in ("fkl", "minillm", "tvd", "atkd") for seed in (0, 1)]

    def make(job):
        if job[0] in ("loss=minillm", "loss=atkd"):
            raise UserError(f"{job[0]} needs more.")
        return job

    launcher = LocalLauncher.__new__(LocalLauncher)
    labels = [" ".join(job) for job in jobs]
    with pytest.raises(UserError) as error:
        launcher._each(make, jobs, labels)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "- loss=minillm seed=0 and 1 more: loss=minillm needs more.",
        "- loss=atkd seed=0 and 1 more: loss=atkd needs more.",
        "To leave them out, type loss=fkl,tvd.",
    ]
    with pytest.raises(UserError, match=r"^loss=atkd needs more\.$"):
        launcher._each(make, jobs[-2:], labels[-2:])
    assert launcher._each(make, jobs[:2], labels) == jobs[:2]


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_the_head_of_the_scaling_sweep_says_the_flops_of_its_runs(scale):
    path = SWEEPS / "scaling.yaml"
    total, teachers = 0.0, {}
    for pairs in jobs(OmegaConf.to_container(OmegaConf.load(path)), scale):
        job = {"data.seq_len": 256, "data.vocab": 1024, "trainer.batch": 2, "teacher.batch": 2} | dict(pairs)
        length, batch = int(job["data.seq_len"]), int(job["trainer.batch"])
        student, teacher = (
            None if job[role] == "none" else flops_module.cost_of(job[role], None, int(job["data.vocab"]), length, role)
            for role in ("student", "teacher")
        )
        source = option("logits", job.get("logits", "online"))(TeacherOrigin(cost=teacher))
        flops = 3 * student.flops_per_token + source.flops_per_token(selects_tokens=False)
        total += flops * int(job["trainer.steps"]) * batch * length
        if teacher and scale == "full":  # on a CPU they are runs of the sweep
            tokens = int(job["teacher.steps"]) * int(job["teacher.batch"]) * length
            teachers[job["teacher"]] = 3 * teacher.flops_per_token * tokens
    documented = float(re.search(rf"\({scale}: .*?([\d.]+e\d+) FLOPs", path.read_text())[1])
    assert documented == pytest.approx(total + sum(teachers.values()), rel=0.05)


@pytest.mark.parametrize(
    ("words", "axes"),
    [
        (["-m", "loss=fkl,akl", "loss.mu=0.3"], ["loss.mu=choice(0.3)"]),
        (
            ["-m", "method=sft,kd", "start.steps=2", "data.files='a b'"],
            ["start.steps=choice(2)", "data.files=choice('a b')"],
        ),
        (["sweeps=minillm", "start.steps=5", "seed=1"], ["--multirun", "start.steps=choice(5)"]),
        (["-m", "loss=fkl,akl", "temperature.tau=2", "loss.mu=0.1,0.2"], []),
        (["loss=akl", "loss.mu=0.3"], []),
    ],
)
def test_a_setting_of_an_option_that_varies_is_an_axis(words, axes):
    assert [word for word in deferred(words) if word not in words] == axes
    assert [undeferred(word) for word in deferred(words) if word != "--multirun"] == words
    assert deferred(deferred(words)) == deferred(words)


def test_options_that_vary_take_a_setting_that_the_default_has_not(tmp_path):
    train(tmp_path, "-m", "truncation=top_k,top_p_k", "truncation.k=5", "trainer.steps=2", "trainer.val_every=2")
    runs = [json.loads(file.read_text())["truncation"] for file in tmp_path.glob("fkl*/config.json")]
    assert sorted(run["_target_"].rpartition(".")[2] for run in runs) == ["top_k", "top_p_k"]
    assert all(run["k"] == 5 for run in runs)
