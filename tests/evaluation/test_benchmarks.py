"""Benchmarks by lm-eval, of tasks in files: made after a run, added to finished ones, refused before training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import train as product
from kd.evaluate import add_benchmarks
from kd.evaluation import benchmarks
from kd.evaluation.benchmarks import Benchmark, benchmarks_of, final_metrics
from kd.evaluation.task_files import check_task_files
from kd.experiment import benchmarking, summary
from kd.experiment.results import read_run
from kd.runs.run import Run
from sweeps.report.benchmarks import benchmark_section
from sweeps.report.groups import group_runs
from sweeps.report.table import rows_of
from tests.refusals import refused
from tests.runs.sealed import RUN
from tests.small import folder, here, result, shared, small_config
from tests.sweeps.fake import Sweep

pytest.importorskip("lm_eval", reason="kd[lm-eval] is not installed")

YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
metadata: {{version: 2.0}}
"""


def put_tasks(place: Path, *names: str) -> Path:
    """Write tasks of ten questions about a chain of states, whose tokens are words."""
    place.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"{n} {n + 1}", "choices": [str(n + 2), str((n + 5) % 9), "7"], "label": n % 3} for n in range(10)
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        (place / f"{name}.yaml").write_text(YAML.format(name=name, data=place / "data.jsonl"))
    return place


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return put_tasks(tmp_path_factory.mktemp("tasks"), "states", "steps")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A root with a student and its teacher."""
    return shared(tmp_path_factory, "student", lambda root: here(root, *RUN))


@pytest.fixture
def root(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "root"))


def test_names_are_tasks_files_or_folders(tasks):
    assert benchmarks_of(f"{tasks}/") == [Benchmark("states", tasks), Benchmark("steps", tasks)]
    assert benchmarks_of([f"{tasks}/steps.yaml", f"{tasks}/"])[0].name == "steps"
    assert len(benchmarks_of([f"{tasks}/steps.yaml", f"{tasks}/"])) == 2 and benchmarks_of(None) == []
    with refused(option="benchmarks", got=f"{tasks}/none.yaml", why="does not exist"):
        benchmarks_of([f"{tasks}/none.yaml"])


@pytest.mark.slow  # lm-eval reads all of its tasks
def test_an_unknown_task_is_refused_with_similar_ones():
    assert benchmarks_of(["arc_easy"]) == [Benchmark("arc_easy")]
    with refused(option="benchmarks", got="arc_esay", hint="arc_easy"):
        benchmarks_of(["arc_esay"])


def test_lm_eval_that_is_not_installed_is_named_with_the_command(monkeypatch, tasks):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refused(option="benchmarks", need="lm-eval", hint="pip install 'kd[lm-eval]'"):
        benchmarks_of([f"{tasks}/"])


def test_data_that_cannot_be_loaded_is_refused_before_training(root, tmp_path, monkeypatch):
    place = put_tasks(tmp_path / "tasks", "states")
    (place / "data.jsonl").unlink()
    config = small_config(root, *RUN, "seed=1", f"benchmarks=[{place}/]")
    monkeypatch.setattr("kd.experiment.prerequisites.ensure", lambda *_: pytest.fail("it trains"))
    with refused(option="benchmarks", got="states", why="could not be loaded", hint="data_files"):
        product.train(config)
    assert len(list(root.glob("fkl-*"))) == 1


@pytest.mark.parametrize(
    ("old", "new", "fields"),
    [("task: states", "task: states\nprocess_docs: !function evil.run", {"why": "!function"}),
     ("task: states", "task: states\nclass: evil", {"why": "class"}),
     ("metric: acc\n", "metric: ./evil.py\n", {"why": "./evil.py"}),
     ("metric: acc\n", "metric: acc\n    hf_evaluate: true\n", {"why": "hf_evaluate"}),
     ("dataset_path: json", "dataset_path: pandas", {"why": "pandas", "need": "json"}),
     ("dataset_path: json", "dataset_path: ./evil.py", {"why": "./evil.py"}),
     ("task: states", "include: ../other.yaml\ntask: states", {"why": "../other.yaml"})],
)  # fmt: skip
def test_a_task_that_would_run_code_is_refused(tmp_path, old, new, fields):
    place = put_tasks(tmp_path, "states")
    path = place / "states.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with refused(option=path, **fields):
        check_task_files(place)


def test_a_template_runs_in_a_sandbox(tasks):
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    benchmarks_of([f"{tasks}/"])
    assert utils.apply_template("{{a}} {{a | regex_replace('1', '2')}}", {"a": "1"}) == "1 2"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ ''.__class__.__mro__ }}", {})


def test_values_are_the_shares_of_right_answers(root, tasks):
    """The choice with the highest log-probability, computed by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = folder(root, "fkl") / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    right = 0
    for line in (tasks / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, scores = tokenizer(row["question"])["input_ids"], []
        for choice in row["choices"]:
            answer = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
            scores.append(sum(logp[len(question) + i - 1, token].item() for i, token in enumerate(answer)))
        right += scores.index(max(scores)) == row["label"]
    ((_, measured),) = benchmarks.measure(str(student), [Benchmark("states", tasks)], "cpu", 2)
    row = measured["tasks"]["states"]
    assert row["values"]["acc"] == pytest.approx(right / 10) and row["samples"] == 10 and row["version"] == 2.0
    share = right / 10
    assert row["stderr"]["acc"] == pytest.approx((share * (1 - share) / 9) ** 0.5, abs=1e-6)
    assert row["higher_is_better"]["acc"] is True
    assert final_metrics({"states": measured})["bench/states/acc"] == row["values"]["acc"]


def test_benchmarks_are_added_to_a_finished_run_once_and_its_name_stays(root, tasks, monkeypatch):
    before = result(folder(root, "fkl"))
    calls, real = [], benchmarks.measure
    monkeypatch.setattr(benchmarks, "measure", lambda model, some, *rest: calls.append([x.name for x in some]) or
                        real(model, some, *rest))  # fmt: skip
    outcome = product.train(small_config(root, *RUN, f"benchmarks=[{tasks}/states.yaml]"))
    assert outcome.before and outcome.run.name == folder(root, "fkl").name and calls == [["states"]]
    after = Run(root, outcome.run.name).result()  # raises for a wrong digest
    assert after == outcome.result and set(after["benchmarks"]) == {"states"}
    assert after["final"].items() >= before["final"].items() and "bench/states/acc" in after["final"]
    assert after["files"] == before["files"]
    outcome.check_files()
    product.train(small_config(root, *RUN, f"benchmarks=[{tasks}/]"))
    assert calls == [["states"], ["steps"]]
    product.train(small_config(root, *RUN, f"benchmarks=[{tasks}/]"))
    assert len(calls) == 2


def test_a_changed_task_is_measured_again(root, tmp_path):
    place = put_tasks(tmp_path / "tasks", "states")
    config = small_config(root, *RUN, f"benchmarks=[{place}/]")
    run = Run(root, folder(root, "fkl").name)
    result = {"benchmarks": {"states": {"files": benchmarks_of([f"{place}/"])[0].digest}}}
    assert benchmarking.missing(config, result) == []
    (place / "data.jsonl").write_text("")
    assert [x.name for x in benchmarking.missing(config, result)] == ["states"] and run.result()


def test_an_interrupted_command_goes_on_where_it_stopped(root, tasks, monkeypatch):
    config = small_config(root, *RUN, f"benchmarks=[{tasks}/]")
    run = Run(root, folder(root, "fkl").name)
    empty = {"tasks": {}, "files": None, "lm_eval": "", "seconds": 0.0}
    measured = []

    def interrupted(model, some, *_):
        for benchmark in some:
            if measured == ["states"]:
                measured.append("stop")
                raise KeyboardInterrupt
            measured.append(benchmark.name)
            yield benchmark, empty | {"files": benchmark.digest}

    monkeypatch.setattr(benchmarks, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmarking.add(run, config, run.result())
    benchmarking.add(run, config, run.result())
    assert measured == ["states", "stop", "steps"] and set(run.result()["benchmarks"]) == {"states", "steps"}


@pytest.mark.slow
def test_the_number_is_that_of_plain_lm_eval(root, tasks, tmp_path):
    student = folder(root, "fkl") / "student"
    words = ["--model", "hf", "--model_args", f"pretrained={student}", "--tasks", "states,steps", "--include_path",
             str(tasks), "--batch_size", "2", "--device", "cpu", "--output_path", str(tmp_path / "out")]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    subprocess.run([sys.executable, "-m", "lm_eval", *words], check=True, env=environment, capture_output=True)
    (path,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(path.read_text())["results"]
    for benchmark, measured in benchmarks.measure(str(student), benchmarks_of([f"{tasks}/"]), "cpu", 2):
        row = measured["tasks"][benchmark.name]
        assert row["values"] == {key: theirs[benchmark.name][f"{key},none"] for key in ("acc", "acc_norm")}
        assert row["stderr"]["acc"] == theirs[benchmark.name]["acc_stderr,none"]


def with_benchmark(root: Path, name: str, value: float, error: float = 0.125) -> None:
    """Give the result of a run a benchmark, as benchmarking.add() does."""
    path = root / name / "result.json"
    content = json.loads(path.read_text())
    row = {"values": {"acc": value}, "stderr": {"acc": error}, "higher_is_better": {"acc": True}, "samples": 10,
           "shots": 0, "version": 1.0}  # fmt: skip
    content["benchmarks"] = {"states": {"tasks": {"states": row}, "files": None, "lm_eval": "0", "seconds": 1.0}}
    content["final"] |= final_metrics(content["benchmarks"])
    path.write_text(json.dumps(content))


def test_a_report_has_paired_intervals_of_benchmarks(tmp_path):
    """Differences 0.2 and 0.4 have the mean 0.3, and a half width of 12.706 * 0.1414 / sqrt(2) = 1.2706."""
    sweep = Sweep(tmp_path)
    for method, values in {"lm": (0.1, 0.2), "fkl": (0.3, 0.6)}.items():
        for seed, value in enumerate(values):
            sweep.done(method, seed, 2.5 - seed)
            with_benchmark(tmp_path, f"run-{len(sweep.runs) - 1}", value)
    entries = [read_run(tmp_path, line) for line in sweep.runs]
    section = benchmark_section(rows_of(group_runs(entries)))
    assert section.columns == ("benchmark", "run", "value", "difference", "standard error")
    cells = {cells[1].split()[0]: cells for cells in section.texts}
    assert cells["fkl"] == ["states acc", "fkl", "0.4500 ± 1.9059", "+0.3000 ± 1.2706", "0.1250"]
    assert cells["language"][2:4] == ["0.1500 ± 0.6353", "–"]


def test_a_report_without_benchmarks_has_no_section(tmp_path):
    sweep = Sweep(tmp_path).done("fkl", 0, 2.5)
    assert benchmark_section(rows_of(group_runs([read_run(tmp_path, line) for line in sweep.runs]))) is None


def test_the_table_of_a_run_has_the_standard_error(tmp_path):
    Sweep(tmp_path).done("fkl", 0, 2.5)
    with_benchmark(tmp_path, "run-0", 0.5)
    console = Console(width=200, record=True)
    console.print(summary.measures(json.loads((tmp_path / "run-0" / "result.json").read_text())))
    assert "states acc" in (text := console.export_text()) and "0.5000 ± 0.1250" in text


def test_finished_runs_of_a_sweep_get_benchmarks(root, tasks, monkeypatch, capsys):
    """The words are `runs=SWEEP benchmarks=[…]`. A second time nothing is measured."""
    name, other = folder(root, "fkl").name, folder(root, "lm").name
    lines = [{"run": run, "overrides": []} for run in (name, other, "lm-100k-000000000000")]
    (root / "sweeps").mkdir()
    (root / "sweeps" / "s.json").write_text(json.dumps({"name": "s", "runs": lines}))
    words = ["runs=s", f"benchmarks=[{tasks}/steps.yaml]", f"root={root}"]
    add_benchmarks(words)
    assert all("bench/steps/acc" in Run(root, run).result()["final"] for run in (name, other))
    assert "2 runs have" in (text := " ".join(capsys.readouterr().err.split())) and "lm-100k-000000000000" in text
    monkeypatch.setattr(benchmarks, "measure", lambda *_: pytest.fail("it is measured again"))
    add_benchmarks(words)
    add_benchmarks([f"runs={name}", *words[1:]])


def test_words_beside_runs_are_refused(tmp_path):
    with refused(option="loss", got="akl", need="benchmarks="):
        add_benchmarks(["runs=s", "loss=akl"])
    with refused(option="runs", got="s", why="does not exist"):
        add_benchmarks(["runs=s", "benchmarks=x", f"root={tmp_path}"])
    with refused(option="benchmarks", need="names of tasks"):
        add_benchmarks(["runs=s", f"root={tmp_path}"])


def test_a_run_that_was_removed_from_wandb_keeps_its_benchmarks(root, tasks, monkeypatch):
    monkeypatch.setattr("kd.runs.loggers.add_final", lambda *_: (_ for _ in ()).throw(RuntimeError("gone")))
    run = Run(root, folder(root, "fkl").name)
    with pytest.warns(UserWarning, match="gone"):
        result = benchmarking.add(run, small_config(root, *RUN, f"benchmarks=[{tasks}/states.yaml]"), run.result())
    assert "states" in result["benchmarks"]
