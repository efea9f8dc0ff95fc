"""A run of one process is rank 0, whatever the environment says; ranks are those that kd itself starts."""

import json
import subprocess
import sys

import pytest

from kd.launchers import OWN, forget_ranks
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
    forget_ranks(environment)
    assert environment == KEPT


def test_a_rank_that_kd_started_has_its_own_and_what_it_starts_has_none():
    environment = dict.fromkeys(VARIABLES, "7") | KEPT | {OWN: "1"}
    forget_ranks(environment)
    assert environment == KEPT | {"LOCAL_RANK": "1", "NODE_RANK": "0"}
    forget_ranks(environment)  # in a process that this one starts
    assert environment == KEPT


@pytest.mark.parametrize("module", ["train", "kd.store", "kd.ranks", "sweeps.fit"])
def test_libraries_are_loaded_after_that(module):
    script = (
        f"import os, {module}\n"
        "from lightning.pytorch.utilities.rank_zero import rank_zero_only\n"
        "print(rank_zero_only.rank, [n for n in os.environ if 'RANK' in n or 'PROCID' in n])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT | dict.fromkeys(VARIABLES, "1"), cwd=TRAIN.parent, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.stdout == "0 []\n", done.stderr


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
