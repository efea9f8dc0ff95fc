"""A result that is there: sealed with the files beside it, dated, and shown as old where the code has changed since."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

import train as product
from kd.data import packing
from kd.errors import UserError
from kd.experiment import planner, prerequisites
from kd.experiment.results import read_run
from kd.launch.job import Job
from kd.runs import provenance
from kd.runs.outcome import RunState
from kd.runs.run import Run, check_student
from kd.system import checkpoint_files, files
from tests.refusals import refused
from tests.small import folder, here, shared, small_config, train, type_in

RUN = ("trainer.steps=2", "teacher.steps=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A root with a student and its teacher."""
    return shared(tmp_path_factory, "student", lambda root: here(root, *RUN))


@pytest.fixture
def root(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "root")
    return tmp_path / "root"


def show(root: Path, *words: str) -> prerequisites.FinishedRun:
    """Run a command on the run in this process, up to where its table is printed."""
    given = small_config(root, *RUN, *words)
    outcome = product.train(given)
    outcome.check_files()
    return outcome


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unseal(run: Path) -> None:
    """Make a result one of a version that kept digests of weights alone."""
    path = run / "result.json"
    result = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("digest", "files", "sources", "date")}
    path.write_text(json.dumps(result))


def test_every_file_of_a_run_is_sealed(finished):
    for run in (folder(finished, "fkl"), folder(finished, "lm")):
        result = json.loads((run / "result.json").read_text())
        written = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name[0] != "."}
        assert result["files"].keys() == written - {"result.json", "state.json"}
        assert all(files.digest(run / name) == digest for name, digest in result["files"].items())
        assert result["digest"] == files.digest_of({k: v for k, v in result.items() if k != "digest"})


def names(root: Path) -> list[str]:
    run = folder(root, "fkl")
    return [
        p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "state.json")
    ]


def test_any_damage_to_a_run_is_said_when_it_is_shown_again(root):
    show(root)
    run = folder(root, "fkl")
    for name in names(root):
        whole = (run / name).read_bytes()
        flip(run / name)
        with refused(option=run / name.partition("/")[0], why="is damaged", commands=f"rm -r {run}") as caught:
            show(root)
        assert name.rpartition("/")[2] in str(caught.value)
        (run / name).unlink()
        if name != "result.json":
            with refused(why="is gone"):
                show(root)
        (run / name).write_bytes(whole)
    show(root)


def test_a_digit_of_a_result_counts_and_its_layout_does_not(root):
    path = folder(root, "fkl") / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result))
    assert show(root).result["final"] == result["final"]
    for key in ("digest", "files"):  # a damaged name of a seal is no result of before
        path.write_text(json.dumps({(f"x{k}" if k == key else k): v for k, v in result.items()}))
        with refused(option=path, why="is damaged"):
            show(root)
    result["final"]["val/lm"] += 0.001
    path.write_text(json.dumps(result))
    with refused(option=path, why="is damaged"):
        show(root)
    entry = read_run(root, {"run": path.parent.name, "overrides": []})
    assert entry.state == "damaged" and entry.result is None


def test_a_report_checks_the_metrics_that_it_draws(root):
    run = folder(root, "fkl")
    line = {"run": run.name, "overrides": []}
    assert read_run(root, line).state == "done"
    edit(run / "metrics.jsonl", '"val/lm": ', '"val/lm": 1')
    entry = read_run(root, line)
    assert entry.state == "damaged" and "metrics.jsonl is damaged" in entry.message


CONFIGS = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "kd.json", "README.md"]


@pytest.mark.parametrize("name", [*CONFIGS, "model.safetensors"])
def test_a_damaged_teacher_is_not_used_whatever_of_it_is_damaged(root, name):
    teacher = folder(root, "lm")
    flip(teacher / "student" / name)
    with refused(option=teacher / "student", why=f"is damaged: {name} is not what was written"):
        here(root, *RUN, "loss=rkl")


def test_a_file_beside_a_students_own_is_said_and_hidden_ones_are_not(root):
    student = folder(root, "lm") / "student"
    (student / ".DS_Store").write_text("x")
    here(root, *RUN, "loss=rkl")
    (student / "adapter_config.json").write_text("{}")
    with refused(option=student / "adapter_config.json", why="was not written by the run"):
        here(root, *RUN, "loss=tvd")


def test_a_student_that_is_loaded_by_its_path_is_checked(root):
    student = folder(root, "lm") / "student"
    words = ("student=hub", f"student.name={student}", "data=text", "data.seq_len=32", "data.val_rows=4")
    (root / "text.txt").write_text("\n\n".join(f"s1 s2 s{i}" for i in range(400)))
    edit(student / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5')
    with refused(option=student, why="is damaged: config.json"):
        here(root, *RUN, *words, f"data.files={root / 'text.txt'}", "data.val_share=0.2", "teacher=none", "logits=none")


def test_a_link_to_a_student_is_checked_as_the_student_is(root):
    student, link = folder(root, "lm") / "student", root / "best"
    link.symlink_to(student)
    check_student(str(link))
    flip(student / "model.safetensors")
    with refused(option=student, why="is damaged"):
        check_student(str(link))


def test_a_sweep_does_not_wait_for_a_damaged_result(tmp_path):
    (tmp_path / "r").mkdir()
    job = Job(Run(tmp_path, "r"), [], "r")
    for text in ('{"digest": "x"}', "{"):
        (tmp_path / "r" / "result.json").write_text(text)
        state = job.look()
        assert state["state"] == RunState.UNKNOWN and "result.json is damaged" in state["reason"]


def test_results_from_before_the_seals_are_accepted_and_marked(root, capsys):
    for run in (folder(root, "fkl"), folder(root, "lm")):
        unseal(run)
    run, result, before = show(root)
    assert before and provenance.doubts(result) == [
        "from before results were sealed: neither damage nor a change of code would be noticed"
    ]
    assert read_run(root, {"run": run.name, "overrides": []}).state == "done"
    assert provenance.doubts_of_many([result]) and not provenance.doubts_of_many([])
    capsys.readouterr()
    student = here(root, *RUN, "loss=rkl")  # which learns from the teacher of before
    message, teacher = capsys.readouterr().err, folder(root, "lm")
    assert f"{teacher.name}, which this run needs" in message and f"\n  rm -r {teacher}\n" in message
    doubt, _ = provenance.doubts(json.loads((student / "result.json").read_text()))
    assert doubt.startswith(f"its teacher {teacher.name} is from before results were sealed")
    flip(folder(root, "lm") / "student" / "model.safetensors")
    with refused(option=teacher / "student", why="is damaged: model.safetensors"):
        here(root, *RUN, "loss=tvd")


def test_what_is_damaged_under_a_url_is_said_and_a_damaged_copy_is_fetched_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    remote_root = tmp_path / "there"
    words = (*RUN, f"root=file://{remote_root}", "logits=none", "teacher=none")
    run = here(tmp_path, *words)  # its copy on this machine
    original = remote_root / run.name / "student"
    assert files.digest(original / "config.json") == files.digest(run / "student" / "config.json")
    remote_run = Run(f"file://{remote_root}", run.name)
    flip(run / "student" / "config.json")
    remote_run.check(remote_run.result(), "student")
    assert (run / "student" / "config.json").read_bytes() == (original / "config.json").read_bytes()
    shutil.rmtree(run / "student")
    remote_run.check(remote_run.result(), "student")
    flip(original / "config.json")
    shutil.rmtree(run / "student")
    with refused(option=f"{remote_run.location}/student", why="is damaged: config.json"):
        remote_run.check(remote_run.result(), "student")
    for name in ("config.json", "metrics.jsonl"):
        flip(remote_root / run.name / name)
        given = small_config(tmp_path, *words)
        with refused(option=f"{remote_run.location}/{name}", why="is damaged"):
            product.train(given).check_files()
        flip(remote_root / run.name / name)
    whole = (remote_root / run.name / "result.json").read_text()
    (remote_root / run.name / "result.json").write_text(whole[:100])
    remote_run = Run(f"file://{remote_root}", run.name)
    with refused(option=f"{remote_run.location}/result.json", why="is damaged", commands=remote_run.removal_command()):
        remote_run.result()
    (remote_root / run.name / "result.json").write_text(whole)
    edit(remote_root / run.name / "result.json", '"val/lm": ', '"val/lm": 1')
    with refused(option=f"{remote_run.location}/result.json", why="is damaged"):
        Run(f"file://{remote_root}", run.name).result()
    (original / "config.json").write_text("{}")
    assert here(tmp_path, *words, "force=true") == run  # made anew, whatever was wrong with it
    remote_run = Run(f"file://{remote_root}", run.name)
    remote_run.check(remote_run.result())


# The code that a result was made by.


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Edits a copy of the package's sources, which is then taken to be what runs."""
    shutil.copytree(provenance.PACKAGE, tmp_path / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    cached = (provenance._definitions, provenance._used, provenance._digest)

    def forget() -> None:
        for function in cached:
            function.cache_clear()

    def change(module: str, *pairs: tuple[str, str]) -> None:
        for old, new in pairs:
            edit(tmp_path / "kd" / f"{module.replace('.', '/')}.py", old, new)
        forget()

    forget()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kd")
    yield change
    forget()


def result(root: Path, name: str = "fkl") -> dict:
    return json.loads((folder(root, name) / "result.json").read_text())


def test_what_a_message_says_to_remove_is_quoted(finished, tmp_path):
    root = tmp_path / "a [b] 'c'"
    shutil.copytree(finished, root)
    run, data, wanted = folder(root, "fkl"), next(root.glob("data/*/manifest.json")).parent, []
    with pytest.raises(UserError) as caught:
        flip(run / "metrics.jsonl")
        Run(root, run.name).check(result(root))
    wanted.append((run, str(caught.value)))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000001.ckpt").write_text("")
    with pytest.raises(UserError) as caught, pytest.warns(UserWarning):
        checkpoint_files.newest(run / "checkpoints")
    wanted.append((run / "checkpoints", str(caught.value)))
    (run / "result.json").write_text("{")
    with pytest.raises(UserError) as caught:
        Run(root, run.name).result()
    wanted.append((run, str(caught.value)))
    (run / "result.json").write_text("{}")
    entry = read_run(root, {"run": run.name, "overrides": []})
    wanted.append((run, f"  {entry.message.partition('first ')[2]}"))
    for name in ("train.npy", "manifest.json"):
        flip(data / name)
        with pytest.raises(UserError) as caught:
            packing.open_packed(data)
        wanted.append((data, str(caught.value)))
        flip(data / name)
    for path, message in wanted:
        (line,) = [line for line in message.splitlines() if line.startswith("  ")]
        assert shlex.split(line) == ["rm", "-r", str(path)]


def test_a_result_says_which_components_it_was_made_by(finished):
    student, teacher = result(finished), result(finished, "lm")
    assert student["sources"]["loss"].keys() == {"fkl"}
    assert {"loss", "truncation", "target", "alpha", "lr", "optim", "data", "logits"} <= student["sources"].keys()
    assert not {"logger", "plain", "record"} & student["sources"].keys()
    assert not {"loss", "truncation", "alpha"} & teacher["sources"].keys()  # without a meaning there
    assert provenance.changes(student) == provenance.changes(teacher) == []


COSMETIC = {
    "a comment": ("objective.losses", "change of sign", "change of its sign"),
    "a docstring": ("objective.losses", "Forward KL(p || q), nats [N].", "Forward KL(p || q)."),
    "layout": (
        "objective.losses",
        "-(p.exp() * (q - p)).sum(-1)  #",
        "(\n        -(p.exp() * (q - p)).sum(-1)\n    )  #",
    ),
    "another loss": ("objective.losses", "return _reverse(q, p)", "return 2 * _reverse(q, p)"),
    "place": ("objective.losses", "def fkl(", "def first():\n    pass\n\n\ndef fkl("),
}


@pytest.mark.parametrize("kind", COSMETIC)
def test_what_changes_nothing_that_is_computed_makes_no_result_old(finished, code, kind):
    module, *change = COSMETIC[kind]
    code(module, change)
    assert provenance.changes(result(finished)) == []


REAL = {
    "the function": ("objective.losses", "-(p.exp() * (q - p))", "-2 * (p.exp() * (q - p))", ["loss=fkl (fkl)"]),
    "a constant": (
        "training.schedules",
        "return 1.0 if progress",
        "return 1.5 if progress",
        ["alpha=constant (_warm)", "lr=cosine (_warm)"],
    ),
    "a helper": (
        "training.schedules",
        "progress / warmup",
        "progress / warmup**2",
        ["alpha=constant (_warm)", "lr=cosine (_warm)"],
    ),
    "its name": ("objective.losses", "def fkl(", "def other(", ["loss=fkl (fkl)"]),
}


@pytest.mark.parametrize("kind", REAL)
def test_a_result_of_other_code_is_shown_as_old_with_what_changed(finished, root, code, kind):
    module, old, new, reasons = REAL[kind]
    code(module, (old, new))
    _, shown, before = show(root)
    assert before and provenance.changes(shown) == reasons
    doubt, *others = provenance.doubts(shown)
    assert bool(others) == any("lr=" in component for component in reasons)  # of the teacher
    assert doubt.startswith(f"old: the code of {', '.join(reasons)} has changed") and "force=true" in doubt
    assert doubt.partition(": ")[2].partition(" has")[0] in provenance.doubts_of_many([shown])[0]


def test_another_function_with_the_name_of_a_parameter_makes_no_result_old(finished, code):
    config = result(finished)["config"] | {"data": "instructions", "rollout": "mixed"}
    before = {"config": config, "sources": provenance.sources(config)}
    assert {"mixed"} <= before["sources"]["rollout"].keys()
    code(
        "rollout.strategies",
        ("def student(", "def student(more: int = 1, *,"),
        ("def teacher(", "def teacher(more: int = 1, *,"),
    )
    assert provenance.changes(before) == []


def test_names_that_a_definition_binds_are_not_followed(code):
    path = provenance.PACKAGE / "rollout" / "strategies.py"
    path.write_text("""
LIMIT = 3
def teacher(): return LIMIT
def helper(): return 2
def mixed(student, teacher=None):
    from kd.data import Batches as fixed
    for student in (lambda x: x,):
        def fixed2(): return helper
    return student, fixed
def student(): return teacher()
def fixed(): return 1
class Both:
    LIMIT = 3
    def one(self, student): return student
    def two(self): return fixed
""")
    code("rollout.strategies")
    used = {
        definition: {name for _, name in provenance._used("rollout.strategies", definition)}
        for definition in ("mixed", "student", "Both")
    }
    assert used["mixed"] == {"mixed", "helper"}
    assert used["student"] == {"student", "teacher", "LIMIT"}
    assert used["Both"] >= {"Both", "fixed"} and "student" not in used["Both"]


def test_a_rollout_is_old_where_the_module_of_its_method_has_changed(finished, code):
    config = result(finished)["config"] | {"data": "instructions", "rollout": "mixed"}
    before = {"config": config, "sources": provenance.sources(config)}
    assert {"mixed", "TeacherMixedSampling", "returns", "Rollout", "Samplers"} <= before["sources"]["rollout"].keys()
    code("rollout.replay", ("RISE = 0.1", "RISE = 0.2"))
    assert provenance.changes(before) == []
    code("rollout.mixed", ("r + gamma * total", "r + total"))
    assert provenance.changes(before) == ["rollout=mixed (returns)"]


def test_a_result_is_shown_as_old_where_the_code_of_its_teacher_has_changed(finished, code):
    shown, teacher = result(finished), folder(finished, "lm").name
    assert shown["origins"]["teacher"]["run"] == teacher
    code("training.schedules", ("progress / warmup", "progress / warmup**2"))
    shown["sources"] = {}
    first, remedy = provenance.doubts(shown)
    assert first == f"its teacher {teacher} is old: the code of lr=cosine (_warm) has changed since"
    assert "force=true" in remedy
    (doubt,) = provenance.doubts_of_many([shown])
    assert doubt.startswith("The teacher or start of 1 of 1 runs is old")
    behind = {"config": {}, "digest": "", "origins": {"start": provenance.origin(shown | {"config": {}})}}
    assert provenance.doubts(behind)[0] == first


def test_code_that_is_edited_while_a_run_trains_is_not_taken_for_its_own(finished, root, code, monkeypatch):
    from kd.training.module import DistillationModule

    module, old, new, reasons = REAL["the function"]
    monkeypatch.setattr(DistillationModule, "on_train_end", lambda self: code(module, (old, new)))
    outcome = json.loads((here(root, *RUN, "seed=7") / "result.json").read_text())
    assert outcome["sources"]["loss"] == result(finished)["sources"]["loss"]
    assert provenance.changes(outcome) == reasons


def test_a_function_that_only_moved_to_another_module_is_the_same(finished, code):
    source = (provenance.PACKAGE / "training" / "schedules.py").read_text()
    start = source.index("def _warm(")
    helper = source[start : source.index("\n\n\n", start)]
    (provenance.PACKAGE / "warming.py").write_text(f"# Moved.\n{helper}\n")
    code("training.schedules", (helper, ""), ("from kd.errors", "from kd.warming import _warm\nfrom kd.errors"))
    assert provenance.changes(result(finished)) == []


def test_a_run_that_was_there_says_when_and_by_which_revision(root):
    run, shown, before = show(root)
    assert before
    words = provenance.done_before(shown)
    assert words == f"done before, on {shown['date']}, git revision {shown['environment']['git'] or 'unknown'}"
    new_run = here(root, *RUN, "seed=5")
    assert new_run != run.folder and not provenance.doubts(json.loads((new_run / "result.json").read_text()))


def test_force_makes_a_run_anew(root):
    run = folder(root, "fkl")
    (run / "wandb-id").write_text("old")
    before, number = result(root), (run / "result.json").stat().st_ino
    outcome = show(root, "force=true")
    assert not outcome.before and outcome.run.folder == run
    assert outcome.result["final"] == before["final"] and not (run / "wandb-id").exists()
    assert (run / "result.json").stat().st_ino != number
    outcome.run.check(outcome.result)
    for name in ("result.json", "student/config.json"):  # whatever was wrong with it
        flip(run / name)
        show(root, "force=true")
        show(root)


def test_force_removes_nothing_before_all_is_checked(root, monkeypatch):
    run, teacher = folder(root, "fkl"), folder(root, "lm")
    before = (run / "result.json").read_bytes()
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense")
    with refused(option="logger", got="wandb", why="WANDB_BASE_URL=nonsense"):
        show(root, "force=true", "logger=wandb")
    (packed,) = root.glob("data/*/train.npy")
    for path, named in ((packed, packed), (teacher / "student" / "config.json", teacher / "student")):
        flip(path)
        with refused(option=named, why="is damaged"):
            show(root, "force=true")
        flip(path)
    assert (run / "result.json").read_bytes() == before and (run / "student" / "model.safetensors").exists()
    show(root)


def test_force_plans_a_run_with_a_damaged_result(root, capsys):
    flip(folder(root, "fkl") / "result.json")
    given = small_config(root, *RUN, "plan=true", "force=true")
    planner.show_plan([given], ["this run"], 1)
    assert "this run" in capsys.readouterr().err


def test_force_leaves_what_a_killed_run_had_done(root, monkeypatch):
    """Use force=true once: it removes the earlier results, and a run that is then interrupted continues."""
    from kd.training.module import DistillationModule

    class Killed(BaseException):
        pass

    real, steps = DistillationModule.training_step, []

    def step(self, *args):
        steps.append(self.global_step)
        if steps.count(4) == 1 and self.global_step == 4:
            raise Killed
        return real(self, *args)

    words = ("trainer.steps=6", "trainer.checkpoint_every=1")
    run = here(root, *RUN, *words)
    monkeypatch.setattr(DistillationModule, "training_step", step)
    with pytest.raises(Killed):
        here(root, *RUN, *words, "force=true")
    assert not (run / "result.json").exists()
    here(root, *RUN, *words, "force=true")
    assert steps == [0, 1, 2, 3, 4, 4, 5]


def test_data_of_other_code_stays_old_until_it_is_packed_anew(finished, root, code):
    code("data.corpora", ("rng = np.random.default_rng(", "rng = np.random.default_rng(1 + "))
    (packed,) = root.glob("data/*/train.npy")
    before = packed.stat().st_ino
    outcome = show(root, "seed=9").result  # on data that was packed before
    assert [change.partition(" ")[0] for change in provenance.changes(outcome)] == ["data=markov"]
    assert packed.stat().st_ino == before
    outcome = show(root, "seed=9", "force=true").result
    assert packed.stat().st_ino != before
    assert provenance.changes(outcome) == [] and packed.exists()


def test_a_run_does_not_go_on_under_other_code(root, code, monkeypatch):
    from kd.training.module import DistillationModule

    class Killed(BaseException):
        pass

    real, words = DistillationModule.training_step, ("seed=8", "trainer.steps=4", "trainer.checkpoint_every=1")

    def step(self, *args):
        if self.global_step == 2:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationModule, "training_step", step)
        here(root, *RUN, *words)
    (checkpoints,) = root.glob("*/checkpoints")
    code("objective.losses", ("-(p.exp() * (q - p))", "-2 * (p.exp() * (q - p))"))
    with refused(why="that of loss=fkl (fkl) has changed") as caught:
        here(root, *RUN, *words)
    code("objective.losses", ("-2 * (p.exp() * (q - p))", "-(p.exp() * (q - p))"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationModule, "training_step", step)
        here(root, *RUN, *words)  # goes on with it
    code("objective.losses", ("-(p.exp() * (q - p))", "-2 * (p.exp() * (q - p))"))
    type_in(str(caught.value))
    assert not checkpoints.exists()
    outcome = json.loads((here(root, *RUN, *words) / "result.json").read_text())
    assert provenance.changes(outcome) == []


@pytest.mark.slow
def test_a_sweep_says_what_was_done_before_and_makes_it_anew_on_request(root):
    words = ("-m", *RUN, "data.tokens=2000", "seed=0,1")
    assert train(root, *words).count("done before, on ") == 1
    again = train(root, *words)
    assert again.count("done before, on ") == again.count(", git revision ") == 2 and "starts" not in again
    forced = train(root, *words, "force=true")
    assert "done before" not in forced and forced.count("starts") == 2
    assert "force" not in json.loads(next((root / "sweeps").glob("*.json")).read_text())["runs"][0]["overrides"]
