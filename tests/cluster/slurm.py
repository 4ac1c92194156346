"""`make cluster`, first part: the graph as jobs of a Slurm cluster of two nodes, which are this machine.

Whatever breaks (a job, a node, the driver), the results in the end are those of a run by plain `dvc repro`, byte for
byte.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.daemons import Slurm, slurm, until
from tests.pipeline.repository import LATEN, dvc, environment, make_repository, ran, run, shrink
from tests.profiles import rows
from tests.soak.interruptions import contents, leftovers

PKT = (sys.executable, "-m", "pkt_stages")
JOB = "srun --ntasks=1 --cpus-per-task=1 --quiet"
TORCHRUN = "--no-python --nproc-per-node"


def some_stages(params: dict[str, Any]) -> None:
    """Both models' attributions beside each other, alignment, training, evaluations."""
    shrink(params)
    rows(
        params,
        align=LATEN,
        finetune={"postpkt_random": {"init": "random"}},
        control={"random": {"code": "random_delta"}},
    )
    params["finetune"] |= {"epochs": 2}
    params["prepare"] |= {"train": 4}  # as many for each of two processes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("cluster") / "slurm") as running:
        yield running


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing has run in it."""
    folder = make_repository(tmp_path_factory.mktemp("fresh") / "repository", some_stages)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "nothing has run")
    return folder


@pytest.fixture(scope="module")
def calm(fresh: Path) -> tuple[Path, set[str]]:
    """The same after plain `dvc repro`, and its stages."""
    folder = Path(shutil.copytree(fresh, fresh.parent / "calm"))
    return folder, ran(dvc(folder, "repro"))


@pytest.fixture
def folder(fresh: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fresh, tmp_path / "repository"))


def begin(
    folder: Path, cluster: Slurm, *words: str, before: tuple[str, ...] = (), **launch: str
) -> subprocess.Popen[str]:
    """`pkt sweep` with four jobs queued or running at a time; the name of a job is its stage's command."""
    launchers = {f"PKT_LAUNCH_{name.upper()}": value for name, value in launch.items()}
    for name in ("attribute", "align", "finetune"):
        launchers.setdefault(f"PKT_LAUNCH_{name.upper()}", f"{JOB} --job-name={name}")
    settings = {
        "PKT_MICRO_BATCH_SIZE": "1",
        "PKT_LAUNCH": f"{JOB} --job-name=other",
        "PKT_LAUNCH_REPORT": "",
        **launchers,
    }
    return subprocess.Popen(
        [*before, *PKT, "sweep", "--workers", "4", *words],
        cwd=folder,
        env=environment(folder) | cluster.environment | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(driver: subprocess.Popen[str], status: int) -> str:
    said, _ = driver.communicate(timeout=900)
    print(said)
    assert driver.returncode == status, said
    return said


def running(cluster: Slurm, name: str) -> list[str]:
    """Ids of the jobs of this name whose processes have begun to work."""
    return [job for job in cluster.jobs("--states=RUNNING", "--name", name) if cluster.works(job)]


def test_the_graph_as_jobs(folder: Path, calm: tuple[Path, set[str]], cluster: Slurm) -> None:
    before = cluster.count_jobs()
    said = end(begin(folder, cluster), 0)
    assert f"sweep: {len(calm[1])} stages: {len(calm[1])} ran" in said
    assert cluster.count_jobs() - before == len(calm[1]) - 1  # the report had no launcher
    assert contents(folder) == contents(calm[0])


def test_whatever_breaks(folder: Path, calm: tuple[Path, set[str]], cluster: Slurm) -> None:
    # A job is cancelled by hand, or by its time limit: all that does not follow from it is run.
    driver = begin(folder, cluster, "--keep-going")
    until(lambda: bool(running(cluster, "attribute")), "an attribution runs")
    cluster("scancel", running(cluster, "attribute")[0])
    said = end(driver, 1)
    assert "1 failed" in said and "CANCELLED" in said
    assert (folder / "artifacts/tiny/transfer/postpkt_random").exists()
    # A node is gone.
    driver = begin(folder, cluster, attribute=f"{JOB} --job-name=attribute --nodelist=node2")
    until(lambda: bool(running(cluster, "attribute")), "an attribution runs")
    cluster.crash("node2")
    said = end(driver, 1)
    assert "1 failed" in said and "node2" in said
    assert cluster.jobs() == []
    # Ctrl-C at the driver, with one node left.
    driver = begin(folder, cluster)
    until(lambda: bool(running(cluster, "align")), "an alignment runs", 300)
    driver.send_signal(signal.SIGINT)
    said = end(driver, 130)
    until(lambda: cluster.jobs() == [], "the jobs are gone", 30)
    assert leftovers(folder) == []
    # The node is back, and the driver runs in an allocation.
    cluster.start("node2")
    allocation = ("salloc", "--nodes=2", "--ntasks=4", "--quiet")
    step = "srun --exact --nodes=1 --ntasks=1 --quiet"
    launch = dict.fromkeys(("attribute", "align", "finetune"), step)
    driver = begin(folder, cluster, before=allocation, **launch)
    end(driver, 0)
    assert contents(folder) == contents(calm[0])
    assert leftovers(folder) == []


def test_two_processes_at_a_stage(folder: Path, calm: tuple[Path, set[str]], cluster: Slurm) -> None:
    """On one node, and on two that find each other."""
    one = f"srun --nodes=1 --ntasks=1 --cpus-per-task=2 --quiet torchrun --standalone {TORCHRUN} 2"
    two = f"srun --nodes=2 --ntasks-per-node=1 --quiet torchrun --nnodes 2 {TORCHRUN} 1 --rdzv-backend c10d"
    end(begin(folder, cluster, attribute=one, finetune=f"{two} --rdzv-endpoint 127.0.0.1:29400"), 0)
    mine, theirs = contents(folder), contents(calm[0])
    scores = {path for path in theirs if path.startswith("artifacts/tiny/attribute/")}
    assert len(scores) == 2 and all(mine[path] == theirs[path] for path in scores)
    path = "results/tiny/train/postpkt_random/gsm8k.json"
    mine, theirs = (json.loads((where / path).read_text()) for where in (folder, calm[0]))
    for loss in ("first_epoch_loss", "last_epoch_loss"):
        assert mine[loss] == pytest.approx(theirs[loss], abs=1e-5)
