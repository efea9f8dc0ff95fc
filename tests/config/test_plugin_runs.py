"""Plug-ins in runs: names, results, metrics, the page of the documentation and the example."""

import json
import os
import re
import sys
from functools import partial

import pytest
import torch

from kd import testing
from kd.config import components, compose, plugins
from kd.config.groups import TruncationConfig
from kd.config.schema import ExperimentConfig
from kd.evaluation import catalog
from kd.evaluation.metrics import Measures
from kd.experiment.dependencies import Plan
from kd.launch.cluster import RemoteJob
from kd.launch.warm import Warm
from kd.objective.target import Target
from kd.store.spec import draws_of
from tests.cases import settings
from tests.config.plugged import EXAMPLE, FILES, _forget, entry_point, write
from tests.refusals import refused
from tests.small import TRAIN, here, listed, result, small_config, train


def test_the_digest_is_of_all_python_files(allowed):
    def digest() -> str:
        plugins._allowed.cache_clear()
        return plugins.digests(["mypkg.losses.mine"])["mypkg"]

    before = digest()
    write(allowed, {"conf/loss/mine.yaml": "_target_: mypkg.losses.mine\nbeta: 0.1\n", "data.txt": "x"})
    assert digest() == before  # settings are in the name already
    write(allowed, {"deep/inside.py": "x = 1\n"})
    after = digest()
    assert after != before
    entry_point(allowed.parent, "mypkg")
    write(allowed.parent, {"extra_mypkg.py": "x = 2\n"})  # of the same distribution
    assert digest() not in (before, after)


def test_only_a_run_that_uses_a_plugin_has_another_name(allowed, tmp_path):
    def name(*words: str) -> str:
        return Plan.from_config(small_config(tmp_path, *words)).run.name

    without = name("seed=1")
    compose.register_folders()
    first = name("loss=mine")
    assert first.startswith("mine-")
    write(allowed, {"deep.py": "x = 1\n"})
    plugins._allowed.cache_clear()
    assert name("loss=mine") != first
    config = small_config(tmp_path, "seed=1")
    assert Plan.from_config(config).run.name == without and Plan.from_config(config.derive(seed=1)).run.name == without


METRIC = """from kd.evaluation.catalog import metric

@metric(label="shown", better="higher")
def {name}(student, target):
    '''Share of something.'''
    return {value}
"""


def test_a_metric_of_a_plugin_is_measured_and_named(allowed):
    write(allowed, {"__init__.py": "", "metrics.py": METRIC.format(name="halves", value="student[:, 0] * 0 + 0.5")})
    metric = catalog.metrics()[-1]
    assert (metric.name, metric.label, metric.better, metric.key) == ("halves", "shown", "higher", "val/halves")
    assert metric.meaning == "Share of something"
    measures = Measures(4)
    target = Target(torch.zeros(6, dtype=torch.long), torch.zeros(6, 3).log_softmax(-1))
    measures.update(torch.nn.Linear(2, 3), torch.ones(6, 2), target.label, target.__getitem__)
    assert measures.result()["halves"] == 0.5
    _forget()


@pytest.mark.parametrize("name", ["fkl", "lm", "rouge_l"])
def test_a_metric_with_the_name_of_one_of_kd_is_refused(name, allowed):
    write(allowed, {"metrics.py": METRIC.format(name=name, value="0")})
    with refused(option=f"mypkg.metrics.{name}", why="has the name of", hint="another name"):
        catalog.metrics()


def test_a_metric_without_a_value_per_position_is_refused_before_training(allowed, tmp_path):
    write(allowed, {"__init__.py": "", "metrics.py": METRIC.format(name="mean", value="student.mean()")})
    with refused(option="the metric mean", why="does not return a value per position", hint="[N]"):
        here(tmp_path / "runs")
    _forget()


@pytest.mark.parametrize("value", ["-student", "-student.sum(-1).mean()"])
@pytest.mark.parametrize("temperature", ["fixed", "entropy"])
def test_a_loss_without_a_value_per_position_is_refused_before_training(value, temperature, allowed, tmp_path):
    loss = f"def mine(student, target, beta: float = 1.0):\n    return {value}\n"
    write(allowed, {"__init__.py": "", "losses.py": loss})
    compose.register_folders()
    with refused(option="loss", why="does not return a value per position", need="[N]", hint=".sum(-1)"):
        here(tmp_path / "runs", "loss=mine", f"temperature={temperature}")
    _forget()


def test_another_machine_has_the_same_plugins(allowed, monkeypatch):
    task = RemoteJob("train.py", ".", "runs", "run", [], "run", 0)
    assert task.environment == {"KD_PLUGINS": "mypkg", "PYTHONPATH": str(allowed.parent)}
    monkeypatch.delenv(plugins.VARIABLE)
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    for _ in range(2):
        task._set_environment()
        assert os.environ["KD_PLUGINS"] == "mypkg"
        assert os.environ["PYTHONPATH"] == os.pathsep.join([str(allowed.parent), "/theirs"])


def test_a_changed_plugin_has_other_warm_processes(allowed):
    before = Warm(str(TRAIN))._sources()
    write(allowed, {"losses.py": FILES["losses.py"] + "\n"})
    assert Warm(str(TRAIN))._sources() != before


# The page of the documentation.

BLOCK = re.compile(r"```(?:python|yaml)\n# (mypackage/\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def documented(package, monkeypatch):
    """The package that docs/extending.md describes."""
    page = (components.PACKAGE.parent / "docs" / "extending.md").read_text()
    write(package.parent, dict(BLOCK.findall(page)))
    monkeypatch.setenv(plugins.VARIABLE, "mypackage")
    compose.register_folders()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


WORDS = [
    "truncation=above", "target=sharpened", "temperature=by_confidence", "routing=surprise", "loss=weighted_fkl",
    "lr=steps", "optim=rmsprop", "logits=smoothed",
]  # fmt: skip


def test_every_kind_in_the_documentation_trains(documented, tmp_path):
    run = here(tmp_path / "runs", *WORDS, "trainer.steps=2", "teacher.steps=2", "truncation.least=0.02")
    record = result(run)
    assert [record["config"][word.partition("=")[0]] for word in WORDS] == [word.partition("=")[2] for word in WORDS]
    assert "val/confidence_ratio" in record["final"] and record["plugins"][0]["name"] == "mypackage"
    words = ["data=instructions", "rollout=early", "rollout.until=0.25", "start=sft", "alpha.peak=1"]
    config = compose.config_of(words)
    rollout = config.rollout.build("rollout")(None)
    assert (rollout.until, rollout.sampling_rate) == (0.25, 0.25)


def test_a_store_of_a_plugins_truncation_serves_what_it_declares(documented, package, tmp_path):
    """A store is written with least=0.01, and read by its path."""
    root, short = tmp_path / "runs", ("trainer.steps=2", "teacher.steps=2", "logits=offline", "truncation=above")
    here(root, *short)
    (store,) = (root / "stores").iterdir()
    path = f"logits.path={store}"
    for words in ((), ("truncation.least=0.02",)):
        assert result(here(root, *short, path, *words))["state"] == "done"
    wide, narrow = (partial(compose.config_of(["truncation=above"]).truncation.build("truncation"), least=x)
                    for x in (0.01, 0.04))  # fmt: skip
    testing.check_nested(wide, narrow)
    with pytest.raises(AssertionError):
        testing.check_nested(narrow, wide)
    with refused(option="truncation", got="above least=0.001", why="needs more than", hint="logits.path out"):
        here(root, *short, path, "truncation.least=0.001")
    with refused(
        option="truncation", got="top_k k=2", why="may need more than", need="@nested", hint="logits.path out"
    ):
        here(root, *short[:-1], path, "truncation=top_k", "truncation.k=2")
    targets = package.parent / "mypackage" / "targets.py"
    text = targets.read_text()
    targets.write_text(text.replace('@nested(least="higher")\n', ""))
    plugins._allowed.cache_clear()
    plugins.syntax_tree.cache_clear()
    with refused(option=store, why="its plugin is mypackage=", hint="leave logits.path out"):  # its code is another now
        here(root, *short, path)
    assert compose.config_of(["truncation=above"]).truncation.nested == {}
    plugins.syntax_tree.cache_clear()


@pytest.mark.parametrize(
    ("decorator", "fields"),
    [
        ('nested(mosT="lower")', {"why": "names mosT, which is none of its settings", "need": "most"}),
        ("nested()", {"why": "names no setting"}),
        ("nested", {"why": "names no setting"}),
        ('nested("most")', {"why": "names no setting"}),
        ('nested(target="lower")', {"why": "names target"}),
        ('nested(most="less")', {"got": "less", "need": "higher or lower"}),
    ],
)
def test_a_wrong_declaration_of_a_truncation_is_refused(decorator, fields, allowed):
    write(allowed, {"cuts.py": f"@{decorator}\ndef first(target, most: int = 3): ...\n"})
    plugins.syntax_tree.cache_clear()
    with refused(option="@nested of mypkg.cuts.first", **fields):
        TruncationConfig("mypkg.cuts.first", {"most": 3}).nested  # noqa: B018


def test_draws_are_those_of_random_alone():
    assert draws_of({"name": "random", "draws": 5}) == 5 and draws_of({"name": "sample", "draws": 5}) is None


def test_kinds_of_the_documentation_are_the_groups():
    page = (components.PACKAGE.parent / "docs" / "extending.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \| `\((.*?)\)", page, re.MULTILINE)
    groups = {group: takes for names, takes in rows for group in re.findall(r"`(\w+)`", names)}
    plain = {group: re.sub(r" \[.*?\]|,? ?…", "", takes).replace(",", "") for group, takes in groups.items()}
    assert plain == components.TAKES and components.TAKES.keys() == components.MODULES.keys()


@pytest.mark.parametrize("group", [group for group in components.MODULES if group != "optim"])
def test_functions_of_kd_take_what_plugins_of_their_group_take(group):
    targets = {node["_target_"] for node in settings(group).values() if "_target_" in node}
    for module, name in (components.locate(target, group) for target in targets):
        path = components.PACKAGE.parent / f"{module.replace('.', '/')}.py"
        assert components.takes_group(plugins.functions(path)[name], group), name


# The example.

SMALL_SUMS = ["data=sums", "data.count=300", "data.vocab=280", "data.seq_len=32", "loss=alpha_divergence"]


@pytest.fixture
def example(package, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv(plugins.VARIABLE, "kd_example")
    compose.register_folders()


def test_the_example_trains_and_its_plugin_is_recorded(example, tmp_path):
    words = [*SMALL_SUMS, "student=100k", "teacher=100k", "trainer.steps=2", "teacher.steps=2", "logger=none"]
    words += [f"root={tmp_path / 'runs'}", "trainer.batch=4", "trainer.micro_batch=4", "data.val_rows=4"]
    import train as product

    outcome = product.train(ExperimentConfig.from_hydra(compose.composed(*words), words))
    assert outcome.run.name.startswith("alpha_divergence-")
    assert outcome.result["plugins"] == [plugins.allowed()["kd_example"].to_dict()]
    assert "val/entropy_gap" in outcome.result["final"]
    assert outcome.result["config"]["data"] == "sums"


@pytest.mark.slow
def test_sweeps_and_ranks_have_the_plugins_of_their_command(tmp_path):
    """A sweep's runs are forked from a warm process; ranks are processes of their own."""
    loss = "kd_example.losses.alpha_divergence"
    folder = write(tmp_path / "theirs", {"loss/half.yaml": f"_target_: {loss}\nalpha: 0.5\n"})
    root, path = tmp_path / "runs", os.pathsep.join([str(TRAIN.parent), str(EXAMPLE)])
    root.mkdir()
    environment = {"KD_PLUGINS": "kd_example", "PYTHONPATH": path}
    train(root, "-m", f"hydra.searchpath=[file://{folder}]", "loss=half,fkl", "trainer.steps=2", **environment)
    results = [result(root / line["run"]) for line in json.loads(listed(root).read_text())["runs"]]
    assert [record["config"]["loss"] for record in results] == ["alpha_divergence", "fkl"]
    assert all(record["plugins"][0]["name"] == "kd_example" for record in results)  # whose metric both measure
    assert str(folder) in listed(root).read_text()
    words = (f"loss._target_={loss}", "trainer.steps=2", "seed=1")
    train(root, *words, "trainer.devices=2", **environment)
    assert "KD_PLUGINS=kd_example" in train(root, *words, code=2)  # which is not allowed without the environment
