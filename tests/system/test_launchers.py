"""A run of one process is rank 0, whatever the environment says. What launchers gave is known, and out of the way."""

import json
import subprocess
import sys

import pytest

from kd.system import launchers
from kd.system.launchers import by_srun, by_torchrun, forget_ranks, without_ranks
from tests.small import ENVIRONMENT, TRAIN, folder, train

# What srun, torchrun, Lightning, Open MPI, MPICH, PMIx, jsrun, MVAPICH, Horovod and others leave behind.
VARIABLES = """SLURM_PROCID SLURM_LOCALID SLURM_NODEID RANK LOCAL_RANK NODE_RANK GROUP_RANK ROLE_RANK GLOBAL_RANK
WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
TORCHELASTIC_RESTART_COUNT OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_UNIVERSE_SIZE
PMI_RANK PMI_SIZE PMI_LOCAL_RANK PMIX_RANK MPI_LOCALRANKID MPI_LOCALNRANKS JSM_NAMESPACE_RANK JSM_NAMESPACE_SIZE
JSM_NAMESPACE_LOCAL_RANK MV2_COMM_WORLD_RANK MV2_COMM_WORLD_LOCAL_RANK HOROVOD_RANK FLUX_TASK_RANK PALS_RANKID
ALPS_APP_PE""".split()  # noqa: SIM905
KEPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "mine", "SLURM_CPUS_PER_TASK": "3", "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2", "KD_ROOT": "runs", "MY_RANKING": "1"}  # fmt: skip


def test_variables_that_give_a_rank_are_removed_and_no_others():
    environment = dict.fromkeys(VARIABLES, "1") | KEPT
    assert without_ranks(environment) == KEPT
    forget_ranks(environment)
    assert environment == KEPT and launchers.given == dict.fromkeys(VARIABLES, "1")
    forget_ranks(environment)  # in a process that this one starts
    assert environment == KEPT and launchers.given == {}


def test_a_process_alone_is_no_rank(monkeypatch):
    monkeypatch.setattr(launchers, "given", {})
    for world_size, several in (("1", False), ("2", True)):
        forget_ranks(dict.fromkeys(VARIABLES, "1") | {"WORLD_SIZE": world_size})
        assert by_torchrun() == several
        assert not by_srun({"SLURM_NTASKS": "8"})  # a batch script
        assert by_srun({"SLURM_STEP_NUM_TASKS": world_size}) == several
    forget_ranks({"WORLD_SIZE": "2", "RANK": "0"})
    assert not by_torchrun() and not by_srun({"SLURM_STEP_NUM_TASKS": "2"})


PROGRAMS = ["train.py", "kd.data", "kd.evaluate", "kd.store", "kd.runs", "kd.bench", "kd.bench.work",
            "sweeps.report", "sweeps.fit", "sweeps.dashboard"]  # fmt: skip


def printed(script: str) -> str:
    """The last line that a script prints in a process to which launchers give rank 1."""
    environment = ENVIRONMENT | dict.fromkeys(VARIABLES, "1")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=TRAIN.parent, text=True, capture_output=True)
    return (done.stdout.splitlines() or [done.stderr])[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_forgets_them_before_it_loads_a_library(program):
    run = "run_path" if program.endswith(".py") else "run_module"
    script = (
        "import runpy, sys, kd.system.launchers\n"
        "def forget(environment):\n"
        "    print([name for name in ('torch', 'lightning', 'transformers', 'wandb') if name in sys.modules])\n"
        "    sys.exit()\n"
        "kd.system.launchers.forget_ranks = forget\n"
        f"runpy.{run}({program!r}, run_name='__main__')"
    )
    assert printed(script) == "[]"


def test_a_program_that_is_not_of_kd_keeps_its_ranks():
    assert printed("import os, kd.objective.losses; print(os.environ['RANK'], os.environ['LOCAL_RANK'])") == "1 1"


def test_every_program_is_among_these():
    folder = TRAIN.parent
    files = [p for place in ("kd", "sweeps") for p in (folder / place).rglob("*.py")] + [TRAIN]
    programs = {
        str(p.relative_to(folder).with_suffix("")).replace("/", ".").removesuffix(".__main__")
        for p in files if '__name__ == "__main__"' in p.read_text()
    }  # fmt: skip
    assert programs == {program.removesuffix(".py") for program in PROGRAMS}


def test_a_run_and_its_teacher_write_everything_with_ranks_of_others(tmp_path):
    train(tmp_path, "trainer.steps=3", "teacher.steps=3", "logger=tensorboard", **dict.fromkeys(VARIABLES, "1"))
    for run in (folder(tmp_path, "fkl"), folder(tmp_path, "lm")):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any("val/lm" in line for line in lines)
        assert "val/lm" in json.loads((run / "result.json").read_text())["final"]
        assert list(run.rglob("events.out.tfevents.*")), run


@pytest.mark.slow
def test_a_sweep_and_several_ranks_are_not_mistaken_for_those_of_others(tmp_path):
    words = ("-m", "seed=0,1", "logits=none", "teacher=none", "trainer.steps=3", "trainer=ddp", "trainer.steps=3")
    train(tmp_path, *words, **dict.fromkeys(VARIABLES, "1"))
    runs = list(tmp_path.glob("lm-*"))
    assert len(runs) == 2
    for run in runs:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps and max(steps) == 3 and steps.count(1) == 1
