"""Code of other people runs if the person at the keyboard allows its package, whatever a config says."""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore

from kd import testing
from kd.config import components, compose, plugins, search_path, token_info
from kd.config.groups import LogitsConfig, RolloutConfig, TruncationConfig
from kd.config.help import axes
from kd.config.schema import ExperimentConfig
from kd.evaluation import catalog
from kd.evaluation.metrics import Measures
from kd.experiment.dependencies import Plan
from kd.launch.cluster import RemoteJob
from kd.launch.warm import Warm
from kd.objective.target import Target
from kd.runs import identity
from kd.store.spec import draws_of
from tests.cases import settings
from tests.refusals import refused
from tests.small import TRAIN, here, listed, result, small_config, train

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "kd-example"
FILES = {
    "__init__.py": "raise RuntimeError('imported')\n",
    "losses.py": """
from kd.objective.token_info import needs, provides
from kd.teachers.base import traits

def mine(student, target, beta: float = 0.5):
    '''Own loss, nats [N].'''

@needs("advantage")
def needy(student, target): ...

def akl(student, target): ...

def helper(path: str): ...

def _hidden(student, target): ...

class Loss: ...

@provides("advantage")
def giver(samplers, share: float = 0.5): ...

@traits("trains_teacher")
def source(origin): ...
""",
    "rollouts.py": """
from kd.rollout.base import traits

@traits("writes_all", until=1.0)
def early(samplers, until: float = 0.5): ...

@traits("writes_all", until=1.0)
def usual(samplers, until: float = 1.0): ...

@traits("by_teacher")
def best(samplers, draws: int = 4): ...
""",
    "data.py": """
from kd.data.corpora import Corpus

def texts(lines: int = 3) -> Corpus: ...

def run(command: str) -> None: ...
""",
    "conf/loss/mine.yaml": "_target_: mypkg.losses.mine\nbeta: 0.5\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def entry_point(root: Path, package: str) -> None:
    """Make a package of a folder of sys.path the plug-in of an installed distribution."""
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: my-{package}\nVersion: 1.2\n",
        "entry_points.txt": f"[kd.plugins]\nany = {package}\n",
        "top_level.txt": f"{package}\nextra_{package}\n",
    }
    write(root / f"my_{package}-1.2.dist-info", about)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be imported, and that would raise an error if it were."""
    write(tmp_path / "mypkg", FILES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "_typed_folders", [])
    store = ConfigStore.instance()
    before = {group: dict(options) for group, options in store.repo.items() if isinstance(options, dict)}
    yield tmp_path / "mypkg"
    for group, options in before.items():
        store.repo[group] = options
    assert not {name for name in sys.modules if name.partition(".")[0] in ("mypkg", "other")}


@pytest.fixture
def allowed(package, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, " mypkg ,")
    return package


# Who is allowed.

NOT_ALLOWED = "not something a config may call"


def test_a_package_that_is_not_allowed_is_refused_with_what_allows_it(package):
    with refused(option="loss._target_", got="mypkg.losses.mine", why=NOT_ALLOWED, hint=("KD_PLUGINS=mypkg", "trust")):
        components.locate("mypkg.losses.mine", "loss")
    with refused(option="loss._target_", hint="KD_PLUGINS=mypkg"):  # as of a manifest, or a result
        components.check_targets({"loss": {"_target_": "mypkg.losses.mine"}})
    assert "mine" not in components.option_names("loss")


def test_the_environment_allows_a_package_and_nothing_is_imported(allowed):
    assert components.locate("mypkg.losses.mine", "loss") == ("mypkg.losses", "mine")
    assert components.locate("mypkg.data.texts", "data") == ("mypkg.data", "texts")
    assert "mine" in components.option_names("loss")
    assert "loss=mine                Own loss [beta=0.5]" in axes()


def test_an_entry_point_allows_a_package(package):
    entry_point(package.parent, "mypkg")
    plugins._allowed.cache_clear()
    assert components.locate("mypkg.losses.mine", "loss") == ("mypkg.losses", "mine")
    (plugin,) = plugins.used(["mypkg.losses.mine"])
    assert plugin.to_dict() == {"name": "mypkg", "version": "1.2", "digest": plugin.digest}


@pytest.mark.parametrize("name", ["nowhere", "kd", "my-package", "mypkg.losses", "/tmp"])
def test_a_name_that_is_no_package_is_refused(name, package, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, f"mypkg,{name}")
    with refused(option=plugins.VARIABLE, got=name):
        plugins.allowed()


def test_an_entry_point_of_what_is_gone_is_refused(package):
    entry_point(package.parent, "gone")
    plugins._allowed.cache_clear()
    with refused(option="the entry point any", got="gone", hint="uninstall the distribution my-gone"):
        plugins.allowed()


@pytest.mark.parametrize(
    ("group", "target"),
    [("loss", "mypkg.losses.helper"), ("loss", "mypkg.losses._hidden"), ("loss", "mypkg.losses.Loss"),
     ("loss", "mypkg.losses.nothing"), ("loss", "mypkg.mine"), ("loss", "mypkg.losses.giver"),
     ("data", "mypkg.data.run"), ("data", "mypkg.losses.helper")],
)  # fmt: skip
def test_only_a_function_that_takes_what_the_group_gives_is_an_option(group, target, allowed):
    others = {"loss": "mypkg.losses.mine", "data": "mypkg.data.texts"}[group]
    with refused(option=f"{group}._target_", got=target, need=others, hint=f"type {group}._target_={others}"):
        components.locate(target, group)


@pytest.mark.parametrize("path", ["student", "teacher", "trainer", "loss.student", "hydra.callbacks.x"])
def test_a_plugin_is_called_in_no_other_place(path, allowed):
    with refused(option=f"{path}._target_", why=NOT_ALLOWED, need="no function at all"):
        components.locate("mypkg.losses.mine", path)


def test_a_function_with_the_name_of_an_option_of_kd_is_refused(allowed):
    with refused(option="loss._target_", got="mypkg.losses.akl", why="name of loss=akl of kd", hint="rename"):
        components.locate("mypkg.losses.akl", "loss")


def test_a_plugin_whose_import_fails(allowed):
    command = "python -c 'import mypkg.losses'"
    why = "could not be imported: RuntimeError: imported"
    with refused(
        option="loss._target_", got="mypkg.losses.mine", why=why, hint="correct the package", commands=command
    ):
        components.build({"_target_": "mypkg.losses.mine"}, "loss")


def test_a_plugin_that_is_no_python(allowed):
    write(allowed, {"losses.py": "def mine(student, target:\n"})
    with refused(option=allowed / "losses.py", why="is no valid Python", hint="correct this file"):
        components.locate("mypkg.losses.mine", "loss")


def test_a_function_that_is_none_once_imported(allowed):
    source = "import functools\n@functools.cache\ndef mine(student, target): ...\n"
    write(allowed, {"losses.py": source, "__init__.py": ""})
    with refused(option="loss._target_", why="is a _lru_cache_wrapper once it is imported", need="a plain function"):
        components.build({"_target_": "mypkg.losses.mine"}, "loss")
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


@pytest.mark.parametrize(("settings", "option"), [({"gamma": 1}, "loss.gamma"), ({"beta": "x"}, "loss.beta")])
def test_the_signature_is_the_schema(settings, option, allowed):
    write(allowed, {"losses.py": FILES["losses.py"], "__init__.py": ""})
    assert components.build({"_target_": "mypkg.losses.mine", "beta": 1}, "loss").keywords == {"beta": 1}
    with refused(option=option):
        components.build({"_target_": "mypkg.losses.mine", **settings}, "loss")
    _forget()


TYPED = "loss._target_=mypkg.losses.mine"


def test_settings_beside_a_typed_function_are_those_of_its_signature(allowed):
    for words, args in (
        ([TYPED], {}),
        ([TYPED, "+loss.beta=0.3"], {"beta": 0.3}),
        ([TYPED, "++loss.beta=0.3"], {"beta": 0.3}),
        (["loss=jsd", TYPED, "loss.beta=0.3"], {"beta": 0.3}),  # which has a setting of this name
    ):
        config = compose.config_of(words)
        assert (config.loss.name, config.loss.args) == ("mine", args)
    cut = "truncation._target_=kd.objective.truncation.top_k"
    assert compose.config_of([cut, "+truncation.k=3"]).truncation.args == {"k": 3}
    adam = compose.config_of(["optim=adamw", "optim._target_=torch.optim.Adam", "+optim.amsgrad=true"]).optim
    assert adam.build("optim").keywords["amsgrad"] is True


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("loss.beta=0.3", {"got": "0.3", "why": "a setting of loss._target_", "hint": "type +loss.beta=0.3"}),
        ("loss.alpha=0.3", {"why": "mypkg.losses.mine has no alpha", "hint": "type +loss.beta=0.3"}),
        ("+loss.alpha=0.3", {"option": "loss.alpha", "why": "has no alpha", "hint": "type +loss.beta=0.3"}),
        ("loss.student=1", {"why": "has no student", "hint": "type +loss.beta=1"}),
    ],
)
def test_a_wrong_setting_beside_a_typed_function_is_answered_with_a_right_one(word, fields, allowed):
    with refused(**fields):
        compose.config_of([TYPED, word])


def test_a_setting_beside_a_function_that_is_not_allowed_names_the_function(package):
    with refused(option="loss._target_", got="mypkg.losses.mine", hint="KD_PLUGINS=mypkg"):
        compose.config_of([TYPED, "loss.beta=0.3"])


def test_declarations_are_read_from_the_source(allowed):
    assert token_info.needs("needy") == ("advantage",)
    assert token_info.providers()["rollout=giver"] == ("advantage",)
    assert token_info.providers_of("advantage", "needy") == ["rollout=giver"]  # mixed computes more
    assert LogitsConfig("mypkg.losses.source").source.trains_teacher
    early = RolloutConfig("mypkg.rollouts.early", {"until": 0.5})
    assert not early.writes_all and early.derive(until=1).writes_all and not early.derive(until=1).by_teacher
    assert RolloutConfig("mypkg.rollouts.usual", {}).writes_all  # by the default of its signature
    best = RolloutConfig("mypkg.rollouts.best", {"draws": 2})
    assert best.writes_all and best.by_teacher
    assert identity.written_by_teacher({"rollout": "best", "rollout.draws": 2})  # so that its seed names the run
    write(allowed, {"losses.py": "@needs(NAMES)\ndef mine(student, target): ...\n"})
    plugins.syntax_tree.cache_clear()
    with refused(option="@needs of mine", why="is no literal", hint="write the value itself"):
        list(plugins.decorated("needs"))


def test_a_decorator_without_brackets_has_no_arguments(allowed):
    write(allowed, {"losses.py": "import x\n@other.section\n@x.more\ndef mine(report): ...\n\ndef bare(report): ...\n"})
    plugins.syntax_tree.cache_clear()
    decorated = [(target, arguments) for target, _, arguments in plugins.decorated("section")]
    assert decorated == [("mypkg.losses.mine", ((), {}))]


# Folders with options.


def test_two_plugins_with_one_option_name_are_refused(allowed, monkeypatch):
    write(allowed.parent / "other", {"__init__.py": "", "conf/loss/mine.yaml": "_target_: kd.objective.losses.fkl\n"})
    monkeypatch.setenv(plugins.VARIABLE, "mypkg,other")
    second = allowed.parent / "other" / "conf" / "loss" / "mine.yaml"
    with refused(option=second, why=str(allowed / "conf" / "loss" / "mine.yaml"), hint="another name"):
        compose.register_folders()


@pytest.mark.parametrize("name", ["loss/akl", "student/1m", "sweeps/loss", "method/kd"])
def test_an_option_that_would_replace_one_of_kd_is_refused(name, allowed):
    write(allowed / "conf", {f"{name}.yaml": "a: 1\n"})
    with refused(option=allowed / "conf" / f"{name}.yaml", why="would take the place of kd's own"):
        compose.register_folders()


GLOBAL = "# @package _global_\n"
HOSTILE = {
    "hydra in a global file": f"{GLOBAL}hydra:\n  callbacks:\n    x:\n      _target_: evil.Boom\n",
    "another package": "# @package hydra.callbacks.x\n_target_: evil.Boom\n",
    "another package below the first line": "# A loss.\n# @package hydra.callbacks.x\n_target_: evil.Boom\n",
    "defaults by a path": "defaults:\n  - ../../evil\n",
    "defaults of hydra": f"{GLOBAL}defaults:\n  - override /hydra/job_logging: default\n",
    "defaults in a package": f"{GLOBAL}defaults:\n  - /loss@hydra.callbacks.x: fkl\n",
    "defaults that are no list": "defaults: {/hydra/launcher: basic}\n",
    "a target": "_target_: evil.Boom\n",
    "a target of the standard library": "_target_: os.system\n",
    "a target far down": f"{GLOBAL}trainer:\n  hooks: [{{_target_: evil.Boom}}]\n",
    "the environment": "_target_: kd.objective.losses.fkl\nx: ${oc.env:HOME}\n",
    "the environment in a key": "_target_: kd.objective.losses.fkl\n? '${oc.env:HOME}'\n: 1\n",
    "the environment, hidden": "_target_: kd.objective.losses.fkl\nx: [{y: '${${a}:HOME}'}]\n",
    "a tag": "!!python/object/apply:os.system ['touch canary']\n",
    "foreign code": f"{GLOBAL}student:\n  trust_remote_code: true\n",
    "no mapping": "[1, 2]\n",
    "binary": "\0",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_of_a_folder_is_refused_when_it_is_read(text, package, monkeypatch):
    folder = write(package.parent / "theirs", {"loss/theirs.yaml": text})
    write(package.parent, {"evil.py": "open('canary', 'w')\nclass Boom: ...\n"})
    monkeypatch.chdir(package.parent)
    assert search_path.take(["--config-dir", "theirs", "seed=1"]) == ["seed=1"]
    assert plugins.folders() == (folder,)
    with refused() as caught:
        compose.register_folders()
    assert str(folder / "loss" / "theirs.yaml") in str(caught.value)
    assert not Path("canary").exists() and "evil" not in sys.modules


def test_a_folder_adds_options_to_every_group(package):
    text = f"{GLOBAL}# Akl with a tail\ndefaults:\n  - override /loss: akl\nloss:\n  mu: 0.25\n"
    files = {"method/tail.yaml": text, "sweeps/mus.yaml": "# Which mu?\nruns:\n- loss=akl loss.mu=0,1\n",
             "truncation/top_3.yaml": "_target_: kd.objective.truncation.top_k\nk: 3\n",
             "notes.txt": "", "hydra/launcher/evil.yaml": "_target_: evil.Boom\n"}  # fmt: skip
    folder = write(package.parent / "theirs", files)
    assert search_path.take([f"hydra.searchpath=[file://{folder}]"]) == []
    assert search_path.words() == [f"hydra.searchpath=[file://{folder}]"]
    compose.register_folders()
    config = compose.config_of(["method=tail", "truncation=top_3"])
    assert (config.loss.name, config.loss.args["mu"]) == ("akl", 0.25)
    assert (config.truncation.name, config.truncation.args["k"]) == ("top_k", 3)
    assert compose.config_of(["logits=offline", "record=top_3"]).record.args["k"] == 3
    assert compose.composed("sweeps=mus").sweep.name == "mus"
    text = axes()
    for piece in (
        "method=tail              Akl with a tail",
        "sweeps=mus               Which mu?",
        "truncation=top_3 ",
    ):
        assert piece in text
    assert "evil" not in text
    with refused(option="loss", got="mine"):
        compose.config_of(["loss=mine"])


def test_files_of_plugins_are_read_once_at_the_start(allowed, monkeypatch):
    folder = write(allowed.parent / "theirs", {"loss/theirs.yaml": "_target_: kd.objective.losses.fkl\n"})
    read, reads = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda file, *args, **kw: (reads.append(file), read(file, *args, **kw))[1])
    compose.register()
    search_path.take(["--config-dir", str(folder)])
    compose.register_folders()
    compose.config_of(["loss=theirs"])
    assert reads.count(allowed / "conf" / "loss" / "mine.yaml") == reads.count(folder / "loss" / "theirs.yaml") == 1


def test_words_of_a_folder_are_read_as_they_are_typed(package):
    folder = write(package.parent / "a folder, of theirs", {"loss/a.yaml": "_target_: kd.objective.losses.fkl\n"})
    search_path.take(["-cd", str(folder)])
    (word,) = search_path.words()
    plugins._typed_folders.clear()
    assert search_path.take([word]) == [] and plugins.typed_folders() == (folder,)


@pytest.mark.parametrize(
    ("words", "option", "fields"),
    [
        (["--config-dir", "nowhere"], "--config-dir", {"why": "no such folder"}),
        (["--config-dir", "~nosuchuser/x"], "~nosuchuser/x", {"why": "there is no home folder for ~nosuchuser"}),
        (["--config-dir"], "--config-dir", {"why": "no such folder"}),
        (["hydra.searchpath=[https://x.org/conf]"], "hydra.searchpath", {"need": "a folder of this machine"}),
        (["hydra.searchpath=file://x"], "hydra.searchpath", {"need": "a list of places"}),
        (["hydra.searchpath=[a],[b]"], "hydra.searchpath", {"need": "a list of places"}),
        (["hydra.searchpath=[pkg://mypkg.conf]"], "hydra.searchpath", {"why": "not allowed", "hint": "KD_PLUGINS="}),
    ],
)
def test_a_place_without_options_is_refused(words, option, fields, package):
    with refused(option=option, **fields):
        search_path.take(words)


def test_a_package_on_the_search_path_is_not_imported(allowed):
    write(allowed, {"more/loss/yours.yaml": "_target_: mypkg.losses.mine\nbeta: 1.0\n"})
    search_path.take(["hydra.searchpath=[pkg://mypkg.more]"])
    assert "yours" in components.option_names("loss")


def test_conf_of_a_plugin_may_hold_other_things(allowed):
    (allowed / "conf" / "loss" / "mine.yaml").unlink()
    write(allowed, {"conf/server/app.yaml": "port: 80\n"})
    compose.register_folders()
    assert "mine" not in components.option_names("loss")


def test_a_folder_without_options_is_refused(package):
    folder = write(package.parent / "theirs", {"losses/mine.yaml": ""})
    search_path.take(["--config-dir", str(folder)])
    with refused(option=folder, why="has no options", hint="loss/NAME.yaml"):
        compose.register_folders()


# Names, results, metrics.


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
