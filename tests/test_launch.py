from __future__ import annotations

import os
import pickletools
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssl_pipeline import cli, config, launch
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.run_folder import RunFolder, read_lines
from tests.test_pretrain import assert_same_run

SMOKE = ("smoke", "data.batch_size=16", "epochs=10", "checkpoint.every_steps=5", "monitor.tensorboard=false")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:01", 1441), ("0:30", 1)],
)
def test_time_limits_in_slurms_words(text: str, expected: int) -> None:
    assert launch.minutes(text) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": "a day"}, "`time` = 'a day': give minutes, HH:MM:SS"),
        ({"time": "0"}, "a time limit is more than 0"),
        ({"time": "1:2:3:4"}, "give minutes"),
        ({"nodes": 0}, "greater than 0"),
        ({"cluster": "pbs"}, "'slurm', 'local' or 'debug'"),
        ({"time": "5", "signal_lead": 300}, "comes at once: lower --signal-lead"),
        ({"node": 2}, "the nearest is `nodes`"),
    ],
)
def test_impossible_resources_are_refused(given: dict, said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        config.validate(launch.Resources, given)


def test_the_lead_follows_the_time() -> None:
    assert launch.Resources().lead == 300
    assert [launch.Resources().sized(verb).time for verb in launch.HOURS] == [
        "24:00:00",
        "2:00:00",
        "8:00:00",
        "4:00:00",
        "24:00:00",
        "1:00:00",
        "1:00:00",
        "1:00:00",
    ]
    with pytest.raises(BadInput, match="--signal-lead 1500 is too long for knn in a slot of 2:00:00"):
        launch.Resources(signal_lead=1500).sized("knn")
    assert launch.Resources(time="24:00:00").lead == 300
    assert launch.Resources(time="5").lead == 60
    assert launch.Resources(time="5", signal_lead=20).lead == 20


def test_the_script_asks_for_what_was_given() -> None:
    given = {"nodes": 4, "gpus_per_node": 8, "cpus_per_task": 8, "time": "1-00", "partition": "p", "account": "a",
             "qos": "q", "exclude": "n[1-2]", "constraint": "a100", "dependency": "afterok:5", "mem": "200G"}  # fmt: skip
    text = launch.script(config.validate(launch.Resources, given), "pretrain", Path("runs/x/logs"))
    for line in (
        "nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8", "time=1440", "partition=p", "account=a",
        "qos=q", "'n[1-2]'", "constraint=a100", "dependency=afterok:5", "mem=200G", "requeue", "open-mode=append",
        "signal=USR2@300", "kill-on-invalid-dep=yes",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH --.*{re.escape(line)}$", text, flags=re.MULTILINE), line
    # Since Slurm 22.05 srun must be told the CPUs of a task again.
    assert re.search(r"^srun .*--kill-on-bad-exit=0 --wait=720 --cpus-per-task=8 ", text, flags=re.MULTILINE)


def test_without_a_time_the_slot_is_a_day(here: Callable, few_digits: Path) -> None:
    words = ("smoke", f"data.root={few_digits}", "data.batch_size=16", "--output", "r", "--dry-run")
    assert "#SBATCH --time=1440\n" in here("launch", "pretrain", *words)[1]
    assert re.findall(r"--time=(\d+)", here("experiment", *words)[1]) == [
        "1440",
        "120",
        "480",
        "240",
        "240",
        "60",
        "60",
        "60",
    ]


def test_a_refusal_by_slurm_names_what_is_queued_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(jobs: list, resources: launch.Resources, name: str, *more: object) -> list:
        if name == "linear-probe":
            raise BadInput("Slurm refuses the job: QOSMaxSubmitJobPerUserLimit")
        return [SimpleNamespace(job_id={"pretrain": "5", "knn": "6"}[name])]

    monkeypatch.setattr(launch, "submit", submit)
    with pytest.raises(BadInput, match=r"already submitted: 5 6 \(scancel them, or let them run\)"):
        launch.experiment(RunFolder(tmp_path), launch.Resources(), {})


def test_a_pickled_job_holds_words_alone(tmp_path: Path) -> None:
    import submitit

    job = launch.Job(["knn", str(tmp_path)], [["launch", "knn", "{backbone}"]])
    submitit.helpers.DelayedSubmission(job).dump(tmp_path / "job.pkl")
    names = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops((tmp_path / "job.pkl").read_bytes()):
        if opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    assert names == {"submitit.core.utils.DelayedSubmission", "ssl_pipeline.launch.Job"}


def test_outside_of_jobs_all_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with launch.outside_of_jobs(quiet=False):
        assert "SLURM_JOB_ID" not in os.environ
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["SLURM_JOB_ID"] == "5"


def test_unpickling_a_job_imports_no_torch() -> None:
    code = "import sys, ssl_pipeline.launch; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_job_submitted_from_a_job_inherits_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SUBMITIT_EXECUTOR", "MASTER_PORT", "RANK", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "x")
    seen = launch.outside()
    assert "SLURM_CONF" in seen
    assert not {"SLURM_JOB_ID", "SUBMITIT_EXECUTOR", "MASTER_PORT", "RANK", "SBATCH_PARTITION"} & set(seen)


# ---------------------------------------------------------------------------------------------------- the command line
@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """`ssl-pipeline` in this process and an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as end:  # argparse's
            status = int(end.code or 0)
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch"], "launch what?"),
        (["launch", "config", "smoke"], "'config' is no job; launch pretrain, report, knn, linear-probe"),
        (["launch", "pretrain", "smoke", "--output", "r", "data.thread=1"], "the nearest is `data.threads`"),
        (["launch", "pretrain", "smoke", "--output", "r", "--nodes", "3"], "cannot be divided by 3 ranks"),
        (["launch", "knn", "nowhere"], "'nowhere' is neither a run folder nor a file of weights"),
        (["launch", "report", ".", "--nodes", "2"], "report is one process"),
        (["launch", "pretrain", "smoke", "--output", "r", "--array", "seed"], "is not of the form key.sub=v1,v2"),
        (["launch", "knn", ".", "--array", "seed=1,2"], "--array varies the options of pretraining"),
        (["launch", "pretrain", "smoke", "--output", "r", "--cluster", "local", "--nodes", "2"], "has one node"),
        (
            ["launch", "pretrain", "smoke", "--output", "r", "--cluster", "local", "--time", "5"],
            "local has no time limit",
        ),
        (["launch", "knn", "."], "is no run folder"),
        (["launch", "spectrum", "."], "is no run folder"),
        (["launch", "pretrain", "smoke", "--output", "r", "--array", "seed=1,1"], "gives a value twice"),
        (["experiment", "smoke", "--output", "r", "--every", "0"], "is no number of epochs"),
        (["plan", "smoke", "--images-per-second", "0"], "is no speed"),
        (["launch", "pretrain", "smoke", "--output", "r", "optim.lr=1"], "the nearest is `optim.learning_rate`"),
        (["launch", "pretrain", "smoke", "--output", "r", "--time", "1:99:00"], "less than 60"),
        (["launch", "pretrain", "smoke", "--output", "r", "--cluster", "local"], "no folder 'data/digits/train'"),
        (["experiment", "smoke", "--output", "r", "--time", "soon"], "give minutes, HH:MM:SS"),
        (["plan", "smoke", "--nodes", "5"], "cannot be divided by 5 ranks"),
    ],
)
def test_bad_input_is_one_sentence(here: Callable, words: list[str], said: str) -> None:
    status, _, stderr = here(*words)
    assert status == Status.BAD_INPUT
    assert said in stderr


def test_without_slurm_it_says_how_else(here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, stderr = here("launch", "pretrain", "smoke", "--output", "r")
    assert status == Status.BAD_INPUT
    assert "no Slurm answers here: submit on a machine of the cluster, or give --cluster local" in stderr


def test_gpus_that_are_not_there_are_refused(here: Callable, few_digits: Path) -> None:
    words = (
        "pretrain",
        "smoke",
        f"data.root={few_digits}",
        "data.batch_size=16",
        "--output",
        "r",
        "--cluster",
        "local",
    )
    status, _, stderr = here("launch", *words, "--gpus-per-node", 2)
    assert (status, "torch sees no GPU on this machine" in stderr) == (Status.BAD_INPUT, True)


def test_an_array_is_checked_whole_before_anything_is_written(here: Callable, few_digits: Path, tmp_path: Path) -> None:
    words = ("launch", "pretrain", "smoke", f"data.root={few_digits}", "data.batch_size=16", "--output", "r")
    status, _, stderr = here(*words, "--array", "optim.learning_rate=0.1,abc")
    assert (status, "'abc'" in stderr) == (Status.BAD_INPUT, True)
    assert list(tmp_path.iterdir()) == []
    stdout = here(*words, "--array", "optim.learning_rate=0.1,0.2", "--dry-run")[1]
    assert re.findall(r"^# ssl-pipeline .* --output (.*)$", stdout, flags=re.MULTILINE) == [
        "r/optim.learning_rate=0.1",
        "r/optim.learning_rate=0.2",
    ]


def test_a_job_that_failed_says_so_in_the_status(here: Callable, few_digits: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open_for_writing({"a": 1})
    run.close()
    run.record("submitted", verb="pretrain", job="77", cluster="local")
    assert "process 77 was started on this machine and has not begun yet" in here("status", "run")[1]
    run.record("failed", verb="pretrain", job="77", status=2)
    (run.logs / "pretrain_2").mkdir(parents=True)
    (run.logs / "pretrain_2" / "77_0_log.out").touch()
    assert "failed with status 2; why: run/logs/pretrain_2/77_0_log.out" in here("status", "run")[1]


def test_a_dry_run_prints_scripts_and_makes_nothing(
    here: Callable, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ("--nodes", 4, "--gpus-per-node", 8, "--time", "24:00:00", "--dry-run")
    words = ("smoke", f"data.root={few_digits}", "data.batch_size=32", "--output", "r")
    status, stdout, stderr = here("launch", "pretrain", *words, *full)
    assert status == 0, stderr
    assert "#SBATCH --nodes=4" in stdout
    status, stdout, stderr = here("experiment", *words, *full)
    assert re.findall(r"^# ---- (.*)$", stdout, flags=re.MULTILINE) == [
        "pretrain",
        "knn",
        "linear-probe",
        "semi-supervised-1",
        "semi-supervised-10",
        "analyze",
        "spectrum",
        "report",
    ]
    assert stdout.count("#SBATCH --dependency=afterok:PRETRAIN") == 6
    assert "# detection is left out: " in stdout
    assert re.findall(r"--gpus-per-node=(\d)", stdout) == ["8", "1", "1", "8", "8", "1", "1"]
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(tmp_path))
    stdout = here("experiment", *words, "data.name=imagenet", "data.protocol=imagenet", *full)[1]
    assert "# semi-supervised-1 is left out: no list of ImageNet's 1 %" in stdout
    assert re.findall(r"--gpus-per-node=(\d)", stdout) == ["8", "1", "8", "1", "1"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plan_measures_a_few_steps(
    command: Callable, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = command(
        "plan", "smoke", f"data.root={few_digits}", "data.batch_size=16", "--time", "1:00:00", "--tasks-per-node", 2
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"measured here \(CPU\), one process, batch 8, \d+ steps: [\d.]+ images/s", done.stdout), (
        done.stdout
    )
    assert re.search(r"^time: .* process-hours$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^checkpoint: 0.00 GB, 2 kept", done.stdout, flags=re.MULTILINE)
    assert "by sbatch:    RUN=runs/smoke sbatch --nodes=1 --ntasks-per-node=2" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_plan_for_gpus_needs_to_be_told_the_speed(here: Callable, few_digits: Path) -> None:
    words = ("plan", "smoke", f"data.root={few_digits}", "data.batch_size=16", "--gpus-per-node", 8)
    _, stdout, _ = here(*words)
    assert "time: unknown; give --images-per-second" in stdout
    _, stdout, _ = here(*words, "--images-per-second", 100, "max_steps=1000000", "epochs=36000")
    # 36,000 epochs of 160 pictures at 8 x 100 images/s: 7200 s on 8 GPUs
    assert "time: 2 h 00 min at 100 images/s a process (communication and waits not included): 16.0 GPU-hours" in stdout


def test_plan_where_the_data_is_not(here: Callable) -> None:
    words = ("plan", "imagenet/simclr", "--nodes", 4, "--gpus-per-node", 8, "--images-per-second", 400)
    assert "time: unknown, since the training pictures are not here; give their number by --pictures" in here(*words)[1]
    stdout = here(*words, "--pictures", 1281167, "epochs=100")[1]
    # 312 steps of 4096 pictures, 100 times, at 32 x 400 images/s: 9984 s
    assert "time: 2 h 46 min at 400 images/s a process (communication and waits not included): 88.7 GPU-hours" in stdout


# --------------------------------------------------------------------------------------------------- on this machine
def wait_for(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_local_returns_at_once_and_a_time_limit_saves_and_goes_on(
    command: Callable, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = (*SMOKE, f"data.root={few_digits}", "max_steps=50")
    done = command("launch", "pretrain", *words, "--output", "run", "--cluster", "local", "--tasks-per-node", 2)
    assert done.returncode == 0, done.stderr
    controller = int(re.search(r"submitted job (\d+) \(local\)", done.stdout).group(1))
    run = tmp_path / "run"
    wait_for(lambda: any(row["step"] >= 8 for row in read_lines(run / "metrics.jsonl")))
    tasks = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    assert len(tasks) == 2
    for task in tasks:
        os.kill(int(task), signal.SIGUSR2)  # as submitit does before the time limit
    assert f"running on {os.uname().nodename}" in command("status", "run").stdout
    wait_for(lambda: [event["status"] for event in RunFolder(run).events() if event["event"] == "end"] == [75, 0])
    assert "finished" in command("status", "run").stdout
    starts = [event for event in RunFolder(run).events() if event["event"] == "start"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 8
    quiet = command("pretrain", *words, "--output", "quiet", ranks=2)
    assert quiet.returncode == 0, quiet.stderr
    assert_same_run(run, tmp_path / "quiet")


@pytest.mark.slow
def test_an_experiment_on_this_machine(command: Callable, few_digits: Path, tmp_path: Path) -> None:
    words = (*SMOKE, f"data.root={few_digits}", "max_steps=3", "--output", "run", "--cluster", "local")
    done = command("experiment", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "run/report.html"
    assert set(RunFolder(tmp_path / "run").read_results()) == {
        "knn", "linear_probe", "semi_supervised_1percent", "semi_supervised_10percent", "analysis", "spectrum",
    }  # fmt: skip
    assert "linear_top1" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_debug_runs_here_and_ends_as_the_verb_does(command: Callable, few_digits: Path) -> None:
    done = command(
        "launch", "pretrain", *SMOKE, f"data.root={few_digits}", "max_steps=1", "--output", "r", "--cluster", "debug"
    )
    assert done.returncode == 0, done.stderr
    assert "r is finished: 1 steps" in done.stderr
    assert command("launch", "knn", "r", "--k", "-1", "--cluster", "debug").returncode == Status.BAD_INPUT


def test_the_printed_flags_are_read_back() -> None:
    given = config.validate(launch.Resources, {"nodes": 2, "time": "30", "partition": "a b"})
    line = shlex.join(["ssl-pipeline", *launch._flags(given)])
    args = cli._parse(["launch", "knn", "x", *shlex.split(line)[1:]])
    assert cli._resources(args) == given
    assert args.words == ["knn", "x"]
