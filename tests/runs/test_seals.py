"""Damage to a finished run is reported, and never used."""

import json
import shutil

import pytest

import train as product
from kd.experiment.results import read_run
from kd.launch.job import Job
from kd.runs import provenance
from kd.runs.outcome import RunState
from kd.runs.run import Run, check_student
from kd.system import files
from tests.refusals import refused
from tests.runs.sealed import RUN, UNSEALED, edit, flip, names, show, unseal
from tests.small import folder, here, small_config


def test_every_file_of_a_run_is_sealed(finished):
    for run in (folder(finished, "fkl"), folder(finished, "lm")):
        result = json.loads((run / "result.json").read_text())
        written = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name[0] != "."}
        assert result["files"].keys() == written - {"result.json", *UNSEALED}
        assert all(files.digest(run / name) == digest for name, digest in result["files"].items())
        assert result["digest"] == files.digest_of({k: v for k, v in result.items() if k != "digest"})


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
        here(
            root,
            "trainer.steps=2",
            *words,
            f"data.files={root / 'text.txt'}",
            "data.val_share=0.2",
            "teacher=none",
            "logits=none",
        )


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
    words = ("trainer.steps=2", f"root=file://{remote_root}", "logits=none", "teacher=none")
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
