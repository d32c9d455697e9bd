"""All that can happen to a job on a cluster, beyond what CI runs: 25 minutes, `make test-slurm-all`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_pipeline.run_folder import RunFolder, read_lines
from tests.slurm.conftest import SCRIPT, TWO_BY_TWO, Cluster, recipe, same, starts

pytestmark = pytest.mark.slurm_all


@pytest.fixture(scope="module")
def long_quiet(slurm: dict[str, str], few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 undisturbed steps, more than two slots of a minute can hold."""
    folder = tmp_path_factory.mktemp("long_quiet")
    cluster = Cluster(folder, slurm)
    run = folder / "run"
    job = cluster.sbatch(*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits, 130), RUN=str(run))
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    return run


# ------------------------------------------------------------------------------------------------------------ time limit
def test_sbatch_reaches_its_time_limit_twice(cluster: Cluster, long_quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    # Slurm looks every 30 s and signals what has less than the lead and 30 s left: here 20 to 50 s after the start.
    short = (*TWO_BY_TWO, "--time=1", "--signal=USR2@10")
    job = cluster.sbatch(*short, "slurm/pretrain_imagenet.sh", *recipe(few_digits, 130), RUN=str(run))
    assert cluster.wait(job, seconds=400) == "COMPLETED", cluster.output(job)
    assert len(starts(run)) >= 3
    same(run, long_quiet)


def test_submitit_reaches_its_time_limit_twice(cluster: Cluster, long_quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    resources = ("--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 1, "--time", 1, "--signal-lead", 10)
    told = cluster.tell("ssl-pipeline", "launch", "pretrain", *recipe(few_digits, 130), "--output", run, *resources)
    job = re.search(r"submitted job (\d+)", told).group(1)
    assert cluster.wait(job, seconds=400) == "COMPLETED"
    assert len(starts(run)) >= 3
    same(run, long_quiet)


# ------------------------------------------------------------------------------------------------------------ preemption
@pytest.fixture
def sigterm_only(cluster: Cluster) -> Iterator[None]:
    """A cluster as Slurm comes: a preempted job gets SIGTERM, whatever its --signal says."""
    conf = Path(cluster.environment["SLURM_CONF"])
    before = conf.read_text()
    conf.write_text(before.replace("SlurmctldParameters=preempt_send_user_signal", ""))
    cluster.tell("scontrol", "reconfigure")
    assert "preempt_send_user_signal" not in cluster.tell("scontrol", "show", "config")
    yield
    conf.write_text(before)
    cluster.tell("scontrol", "reconfigure")


@pytest.mark.usefixtures("sigterm_only")
def test_preempted_by_sigterm_alone(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    job = cluster.sbatch(*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits), RUN=str(run))
    cluster.until_step(run, 12)
    cluster.wait(cluster.preempt())
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert starts(run)[1]["step"] > 12
    same(run, quiet)


@pytest.mark.usefixtures("sigterm_only")
def test_submitit_is_preempted_by_sigterm_alone(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    resources = ("--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 1, "--time", 5, "--signal-lead", 30)
    told = cluster.tell("ssl-pipeline", "launch", "pretrain", *recipe(few_digits), "--output", run, *resources)
    job = re.search(r"submitted job (\d+)", told).group(1)
    cluster.until_step(run, 12)
    cluster.wait(cluster.preempt())
    assert cluster.wait(job) == "COMPLETED"
    assert starts(run)[1]["step"] > 12
    same(run, quiet)


def test_preempted_while_it_starts(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    job = cluster.sbatch(*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits), RUN=str(run))
    cluster.wait(job, "RUNNING")
    time.sleep(2)  # torch is being imported
    cluster.wait(cluster.preempt())
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    same(run, quiet)


def test_an_evaluation_that_is_preempted_starts_again(cluster: Cluster, quiet: Path) -> None:
    for script, wanted in (("knn", "knn5_top1"), ("linear_probe", "linear_top1")):
        one = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=5")
        job = cluster.sbatch(*one, f"slurm/{script}.sh", quiet)
        cluster.wait(job, "RUNNING")
        time.sleep(1.5)
        cluster.wait(cluster.preempt())
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        assert f"requeued job {job}" in cluster.output(job)
        assert RunFolder(quiet).read_results()[script][wanted] > 10


def test_by_submitit_too(cluster: Cluster, quiet: Path) -> None:
    told = cluster.tell("ssl-pipeline", "launch", "knn", quiet, "--time", 5)
    job = re.search(r"submitted job (\d+)", told).group(1)
    log = quiet / "logs" / "knn_1" / f"{job}_0_log.out"
    cluster.until(lambda: log.is_file() and "Loading pickle" in log.read_text(), "the evaluation to start")
    time.sleep(1)
    cluster.wait(cluster.preempt())
    assert cluster.wait(job) == "COMPLETED"
    assert "this job is " in log.read_text()  # submitit requeued it


# ----------------------------------------------------------------------------------------------------------- dead nodes
@pytest.mark.parametrize("place", [0, 1])
def test_a_node_dies_and_the_run_goes_on_elsewhere(cluster: Cluster, quiet: Path, few_digits: Path, place: int) -> None:
    run = cluster.folder / "run"
    job = cluster.sbatch(*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits), RUN=str(run))
    cluster.until_step(run, 12)
    nodes = cluster.tell("scontrol", "show", "hostnames", starts(run)[0]["nodes"]).split()
    cluster.tell(SCRIPT, "kill-node", nodes[place])
    try:
        assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=240) == "COMPLETED", cluster.output(job)
    finally:
        cluster.tell(SCRIPT, "start-node", nodes[place])
        cluster.until(
            lambda: not cluster.tell("sinfo", "-h", "-t", "down,drain,unknown", "-o", "%N"), "the node to be back"
        )
    first, second = starts(run)
    assert nodes[place] not in cluster.tell("scontrol", "show", "hostnames", second["nodes"]).split()
    assert second["step"] == 10  # the last checkpoint: a dead node sends no signal
    assert first["job"] == second["job"] == job
    same(run, quiet)


# --------------------------------------------------------------------------------------------------------- several runs
def test_an_array_over_two_learning_rates(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    words = ("launch", "pretrain", *recipe(few_digits, 30), "--output", run, "--array", "optim.learning_rate=0.01,0.02")
    told = cluster.tell("ssl-pipeline", *words, "--gpus-per-node", 2, "--cpus-per-task", 1, "--time", 5)
    jobs = re.search(r"submitted jobs (\d+_0), (\d+_1)", told).groups()
    # The last task of an array has the array's own number: a signal to it alone must requeue it alone.
    cluster.until_step(run / "optim.learning_rate=0.02", 2)
    cluster.tell("scancel", "--signal=USR2", jobs[1])
    for number, rate in enumerate((0.01, 0.02)):
        cluster.until(
            lambda number=number: (
                cluster.tell("sacct", "-n", "-X", "-j", jobs[number], "-o", "State").strip() == "COMPLETED"
            ),
            "the array",
        )
        row = read_lines(run / f"optim.learning_rate={rate}" / "metrics.jsonl")[-1]
        assert (row["step"], row["lr_matrices"]) == (30, pytest.approx(rate, rel=0.3))
    assert [len(starts(run / f"optim.learning_rate={rate}")) for rate in (0.01, 0.02)] == [1, 2]


def test_two_runs_at_once_on_the_same_nodes(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    runs = [cluster.folder / name for name in ("a", "b")]
    line = (*TWO_BY_TWO, "--nodelist=node[3-4]", "slurm/pretrain_imagenet.sh", *recipe(few_digits))
    jobs = [cluster.sbatch(*line, RUN=str(run)) for run in runs]
    for run in runs:
        cluster.until_step(run, 1)
    assert {cluster.state(job) for job in jobs} == {"RUNNING"}
    assert [cluster.wait(job, seconds=180) for job in jobs] == ["COMPLETED", "COMPLETED"]
    for run in runs:
        assert starts(run)[0]["nodes"] == "node[3-4]"
        same(run, quiet)


def test_scancel_saves_and_does_not_come_back(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    line = (*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits))
    job = cluster.sbatch(*line, RUN=str(run))
    cluster.until_step(run, 12)
    cluster.tell("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    cluster.quiet()
    assert [event["event"] for event in RunFolder(run).events()] == ["start", "end"]
    assert f"Slurm job {job} CANCELLED" in cluster.tell("ssl-pipeline", "status", run)
    again = cluster.sbatch(*line, RUN=str(run))
    assert cluster.wait(again) == "COMPLETED", cluster.output(again)
    assert starts(run)[1]["step"] > 12
    same(run, quiet)


def test_a_signal_by_hand_saves_and_requeues_and_a_second_one_does_no_harm(
    cluster: Cluster, quiet: Path, few_digits: Path
) -> None:
    run = cluster.folder / "run"
    job = cluster.sbatch(*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits), RUN=str(run))
    cluster.until_step(run, 12)
    for signal in ("USR2", "TERM", "USR1", "USR2"):
        cluster.run("scancel", f"--signal={signal}", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert len(starts(run)) == 2
    same(run, quiet)


# ------------------------------------------------------------------------------------------------------------ preflight
@pytest.mark.parametrize(
    ("fault", "nodes", "reason"),
    [
        ("selftest:node2", 2, "a fault was injected"),
        ("versions:node3", 3, "torch is 0.0, elsewhere"),
        ("bandwidth:node3", 3, "its link carries 0.00 GB/s"),
    ],
)
def test_preflight_puts_the_job_back_without_the_bad_node(
    cluster: Cluster, quiet: Path, few_digits: Path, fault: str, nodes: int, reason: str
) -> None:
    run = cluster.folder / "run"
    if nodes == 2:
        line = (*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits))
    else:
        line = (*TWO_BY_TWO, "--nodes=3", "--ntasks-per-node=1", "slurm/pretrain_imagenet.sh", *recipe(few_digits, 3))
        line = (*line, "data.batch_size=15")
    job = cluster.sbatch(*line, RUN=str(run), SSL_PIPELINE_FAULT=fault)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    (event,) = [event for event in RunFolder(run).events() if event["event"] == "excluded"]
    bad = fault.partition(":")[2]
    assert event["nodes"] == [bad]
    assert reason in event["reason"]
    assert f"ExcNodeList={bad}" in cluster.tell("scontrol", "-o", "show", "job", job)
    (start,) = starts(run)
    assert bad not in cluster.tell("scontrol", "show", "hostnames", start["nodes"]).split()
    if nodes == 2:
        same(run, quiet)


def test_preflight_gives_up_after_two_exclusions(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    line = (*TWO_BY_TWO, "--nodelist=node1", "slurm/pretrain_imagenet.sh", *recipe(few_digits))
    all_others = ",".join(f"node{number}" for number in range(2, 9))
    job = cluster.sbatch(*line, RUN=str(run), SSL_PIPELINE_FAULT=f"selftest:{all_others}")
    assert cluster.wait(job) == "FAILED"
    assert "ExitCode=78:0" in cluster.tell("scontrol", "-o", "show", "job", job)
    last = (run / "logs" / f"{job}_0.log").read_text().strip().splitlines()[-1]
    bad = re.search(r"preflight failed: node (\w+): a fault was injected: leave out by --exclude=\1$", last).group(1)
    excluded = [event["nodes"] for event in RunFolder(run).events()]
    assert len(excluded) == 2
    assert len({bad, *excluded[0], *excluded[1]}) == 3


# --------------------------------------------------------------------------------------------------- beside the training
def test_backbones_are_evaluated_beside_the_training(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    words = ("experiment", *recipe(few_digits, 40), "--output", run, "--every", 2, "--time", 5, "--cpus-per-task", 1)
    told = cluster.tell("ssl-pipeline", *words)
    report = re.search(r"^(\d+)  report", told, flags=re.MULTILINE).group(1)
    cluster.wait(report, seconds=240)
    cluster.quiet()
    assert sorted(path.name for path in (run / "backbones").glob("*.pth")) == ["epoch_0002.pth", "epoch_0004.pth"]
    results = RunFolder(run).read_results()
    names = {f"{verb}_{epoch}" for verb in ("knn", "linear_probe") for epoch in ("epoch_0002", "epoch_0004")}
    assert set(results) == {"knn", "linear_probe", "semi_supervised_1percent", "semi_supervised_10percent", *names}
    assert results["knn"]["knn5_top1"] == results["knn_epoch_0004"]["knn5_top1"]
    submitted = [event for event in RunFolder(run).events() if event["event"] == "submitted" and "source" in event]
    assert len(submitted) == 4  # each once


def test_evaluations_wait_for_a_pretraining_that_is_requeued(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    resources = ("--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 1, "--time", 5)
    told = cluster.tell("ssl-pipeline", "experiment", *recipe(few_digits), "--output", run, *resources)
    jobs = dict(reversed(match) for match in re.findall(r"^(\d+)  ([\w-]+)", told, flags=re.MULTILINE))
    cluster.until_step(run, 3)
    cluster.tell("scontrol", "requeue", jobs["pretrain"])
    assert cluster.wait(jobs["report"], seconds=240) == "COMPLETED"
    assert {verb: cluster.state(job) for verb, job in jobs.items()} == dict.fromkeys(jobs, "COMPLETED")
    assert len(starts(run)) == 2
    few = {"semi_supervised_1percent", "semi_supervised_10percent"}
    assert set(RunFolder(run).read_results()) == {"knn", "linear_probe", *few}
