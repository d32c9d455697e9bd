# What the job scripts beside it share. Sourced by them inside the job; docs/slurm.md tells how to use them.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
umask go-w # a run is its owner's

# What your cluster needs before Python starts (module load, conda activate, NCCL's variables) goes here.

# The interpreter: PYTHON, else the one that `make setup` made here, else an active environment's.
python=${PYTHON:-}
[[ -n $python ]] || { [[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python; } || python=python3

# A requeued job keeps its number, so this names the run through all its slots.
first_job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || first_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# run_job LOGS VERB [WORD ...]: one process a task; puts the job back into the queue where it was stopped to go on later.
run_job() {
    local logs=$1 status=0 signalled=1 pid
    shift
    mkdir -p "$logs"
    # srun passes signals on to the tasks, and what these return decides: the script itself only must not die of them.
    trap 'signalled=1' TERM USR1 USR2
    # One task's end ends no other one (all save together). Those that hang after one died end by distributed.timeout, whose
    # default is ten minutes, and say why; srun ends what is left.
    srun --kill-on-bad-exit=0 --wait=720 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        --open-mode=append --output="$logs/%j_%t.log" "$python" -m ssl_pipeline "$@" &
    pid=$!
    while ((signalled)); do # a signal interrupts `wait`
        signalled=0 status=0
        wait "$pid" || status=$?
    done
    # 75: stopped by a signal, everything saved. 138, 140, 143: Python died of SIGUSR1, SIGUSR2 or SIGTERM before it could
    # listen to them. Whether the job is to come back, and not cancelled or on its way already, `requeue` asks Slurm.
    case $status in
        75 | 138 | 140 | 143) "$python" -m ssl_pipeline requeue || true ;;
    esac
    exit "$status"
}
