"""What CI runs on the real cluster: sbatch and preemption, submitit and requeue, an experiment, a full-size script."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from ssl_pipeline import backbone
from ssl_pipeline.run_folder import RunFolder, read_lines
from tests.slurm.conftest import REPOSITORY, TWO_BY_TWO, Cluster, recipe, same, starts

pytestmark = pytest.mark.slurm


def test_sbatch_is_preempted_by_a_higher_partition_and_goes_on(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    line = (*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits))
    job = cluster.sbatch(*line, RUN=str(run))
    cluster.until_step(run, 12)
    higher = cluster.preempt()
    cluster.wait(higher)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert f"requeued job {job}" in cluster.output(job)
    first, second = starts(run)
    assert second["step"] > 12  # it saved at the signal, not only at step 10
    assert (first["job"], second["job"], second["restart"]) == (job, job, 1)
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"{job}_{rank}.log" for rank in range(4)]
    same(run, quiet)


def test_submitit_is_requeued_and_goes_on(cluster: Cluster, quiet: Path, few_digits: Path) -> None:
    run = cluster.folder / "run"
    resources = ("--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 1, "--time", 5, "--signal-lead", 30)
    told = cluster.tell("ssl-pipeline", "launch", "pretrain", *recipe(few_digits), "--output", run, *resources)
    job = re.search(r"submitted job (\d+) \(slurm\)", told).group(1)
    cluster.until_step(run, 12)
    shown = cluster.tell("ssl-pipeline", "status", run)
    assert re.search(rf"Slurm job {job} RUNNING on node\[\d-\d\]", shown), shown
    assert re.search(r"step 1\d of 30, epoch 2 of 20", shown), shown
    cluster.tell("scontrol", "requeue", job)
    assert cluster.wait(job) == "COMPLETED"
    assert len(starts(run)) == 2
    assert starts(run)[1]["step"] > 12  # it saved at SIGTERM
    same(run, quiet)
    shown = cluster.tell("ssl-pipeline", "status", run)
    for text in (f"{run}: finished", "step 30 of 30", "1 restart, 4 ranks", "last checkpoint: step 30"):
        assert text in shown


def test_an_experiment_with_one_evaluation_that_fails(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    (run / "results" / "knn.json" / "in the way").mkdir(parents=True)  # so that k-nn cannot write its result
    told = cluster.tell("ssl-pipeline", "experiment", *recipe(few_digits, 20), "--output", run, "--time", 5)
    jobs = dict(reversed(match) for match in re.findall(r"^(\d+)  ([\w-]+)", told, flags=re.MULTILINE))
    assert list(jobs) == [
        "pretrain",
        "knn",
        "linear-probe",
        "semi-supervised-1",
        "semi-supervised-10",
        "analyze",
        "spectrum",
        "report",
    ]
    assert "PENDING (Dependency)" in cluster.tell("ssl-pipeline", "status", run)
    assert cluster.wait(jobs["report"]) == "COMPLETED"
    ends = {verb: cluster.state(job) for verb, job in jobs.items()}
    assert ends == {**dict.fromkeys(jobs, "COMPLETED"), "knn": "FAILED"}
    assert json.loads((run / "results" / "linear_probe.json").read_text())["linear_top1"] > 10
    assert "linear_top1" in (run / "report.html").read_text()
    # The failed one again, alone, by the line that was printed.
    (run / "results" / "knn.json" / "in the way").rmdir()
    (run / "results" / "knn.json").rmdir()
    again = re.search(r"again alone: (ssl-pipeline launch knn .*)", told).group(1).split()
    job = re.search(r"submitted job (\d+)", cluster.tell(*again)).group(1)
    assert cluster.wait(job) == "COMPLETED"
    assert json.loads((run / "results" / "knn.json").read_text())["knn5_top1"] > 10


def reached(evaluations: Path, epoch: int) -> bool:
    rows = [row for path in evaluations.glob("*/metrics.jsonl") for row in read_lines(path)]
    return any(row["epoch"] >= epoch for row in rows)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("linear_probe", ("--protocol", "imagenet", "recipe.learning_rates=[0.1, 0.3]", "recipe.choose_on=val")),
        ("semi_supervised", ("--percent", "50")),
    ],
)
def test_training_on_labels_is_preempted_and_goes_on(
    cluster: Cluster, quiet: Path, script: str, words: tuple[str, ...]
) -> None:
    """Two tasks; what it comes to is what one that nothing disturbed comes to, to the last bit."""
    found = []
    for disturbed in (False, True):
        copy = shutil.copytree(quiet, cluster.folder / str(disturbed), ignore=shutil.ignore_patterns("evaluations"))
        two = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=5", "--signal=USR2@30")
        job = cluster.sbatch(*two, f"slurm/{script}.sh", copy, *words, "recipe.batch_size=16", "recipe.epochs=12")
        if disturbed:
            cluster.until(partial(reached, copy / "evaluations", 3), "the third epoch")
            cluster.wait(cluster.preempt())
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        assert (f"requeued job {job}" in cluster.output(job)) == disturbed
        (folder,) = (copy / "evaluations").iterdir()
        assert len(starts(RunFolder(folder).path)) == 1 + disturbed
        found.append(json.loads((folder / "history.json").read_text()))
        assert len(RunFolder(copy).read_results()) == 1
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_detection_is_preempted_and_goes_on(cluster: Cluster) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from tests.evaluation.test_detectron2 import SMALL as FEW
    from tests.evaluation.test_detectron2 import moved, photographs

    network, options = moved("resnet50")
    backbone.save(network, options, cluster.folder / "backbone.pth")
    data = photographs(cluster.folder / "datasets")
    two = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10", "--signal=USR2@30")
    words = (*two, "slurm/detection_transfer.sh", cluster.folder / "backbone.pth", "--datasets", data)
    rest = (
        "--output",
        cluster.folder / "out",
        *FEW,
        "SOLVER.MAX_ITER=12",
        "SOLVER.STEPS=(8,)",
        "SOLVER.CHECKPOINT_PERIOD=2",
    )
    job = cluster.sbatch(*words, *rest)
    first = "out/evaluations/*/detectron2/model_0000001.pth"
    cluster.until(lambda: list(cluster.folder.glob(first)), "the first checkpoint", 240)
    cluster.wait(cluster.preempt())
    assert cluster.wait(job, seconds=400) == "COMPLETED", cluster.output(job)
    assert f"requeued job {job}" in cluster.output(job)
    (folder,) = (cluster.folder / "out" / "evaluations").iterdir()
    begun = [event["step"] for event in starts(folder)]
    assert begun[0] == 0
    assert 2 <= begun[1] < 12
    assert len(RunFolder(cluster.folder / "out").read_results()) == 1


def test_evaluations_of_a_pretraining_that_failed_do_not_wait_for_ever(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    too_many = "checkpoint.keep=1000000000"  # for which no disk has room: found inside the job, before its first step
    told = cluster.tell("ssl-pipeline", "experiment", *recipe(few_digits, 20), too_many, "--output", run, "--time", 5)
    jobs = dict(reversed(match) for match in re.findall(r"^(\d+)  ([\w-]+)", told, flags=re.MULTILINE))
    assert cluster.wait(jobs["pretrain"]) == "FAILED"
    assert "ExitCode=77:0" in cluster.tell("scontrol", "-o", "show", "job", jobs["pretrain"])
    assert {cluster.wait(jobs[name]) for name in jobs if name not in ("pretrain", "report")} == {"CANCELLED"}
    cluster.wait(jobs["report"])


def test_full_size_scripts_pass_test_only(cluster: Cluster) -> None:
    done = cluster.run("sbatch", "--test-only", "--nodes=8", "slurm/pretrain_imagenet.sh")
    assert done.returncode == 0, done.stderr
    assert "using 512 processors on nodes node[1-8]" in done.stderr
    refused = cluster.run("sbatch", "--test-only", "--nodes=9", "slurm/pretrain_imagenet.sh")
    assert refused.returncode != 0


def test_plan_asks_the_cluster(cluster: Cluster, few_digits: Path) -> None:
    words = (
        "plan",
        "imagenet/barlow_twins_sparsehead",
        f"data.root={few_digits}",
        "data.batch_size=64",
        "--time",
        "24:00:00",
    )
    full = ("--nodes", 8, "--gpus-per-node", 8, "--cpus-per-task", 8, "--images-per-second", 400)
    shown = cluster.tell("ssl-pipeline", *words, *full, "--output", cluster.folder / "run")
    for text in (
        "batch per rank: 1 on 64 ranks",
        "GPU-hours",
        "slots of 24:00:00: 1",
        "a preempted job gets the signal of --signal and 20 s before it is killed",
        "to start at",
        "#SBATCH --nodes=8",
    ):
        assert text in shown, shown
    assert not (cluster.folder / "run").exists()
    refused = cluster.run("ssl-pipeline", *words, *full, "--partition", "nowhere")
    assert refused.returncode == 2
    assert "Slurm refuses this job" in refused.stderr
    assert "invalid partition" in refused.stderr


def test_a_job_that_slurm_refuses_is_one_sentence(cluster: Cluster, few_digits: Path) -> None:
    run = cluster.folder / "run"
    words = ("launch", "pretrain", *recipe(few_digits), "--output", run, "--partition", "nowhere")
    refused = cluster.run("ssl-pipeline", *words)
    assert refused.returncode == 2
    assert "Slurm refuses the job" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not [event for event in RunFolder(run).events() if event["event"] == "submitted"]


def test_submitted_from_elsewhere_the_script_says_from_where(cluster: Cluster) -> None:
    job = cluster.sbatch(*TWO_BY_TWO, REPOSITORY / "slurm" / "pretrain_imagenet.sh", cwd=cluster.folder)
    assert cluster.wait(job) == "FAILED"
    assert "submit it from the repository's root, where slurm/job.sh lies" in cluster.output(job)
