#!/usr/bin/env bash
# `ssl-pipeline linear-probe` as a Slurm job. From the repository's root:
#
#   sbatch slurm/linear_probe.sh RUN [key=value ...]            or a file of weights and --config NAME; `ssl-pipeline linear-probe --help`
#
# Results go to RUN/results. On ImageNet (protocol imagenet) it goes on in the next slot as pretraining does; on features of small
# data it starts again after a preemption, and one process is enough: --ntasks-per-node=1 --gpus-per-node=1. docs/slurm.md.
#
# Yours to edit, or to give to sbatch; with ## it is a comment:
##SBATCH --partition=
##SBATCH --account=
#SBATCH --job-name=linear-probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=8:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

source "${SLURM_SUBMIT_DIR:?is not set: sbatch runs this script}/slurm/job.sh" \
    || { echo "$0: submit it from the repository's root, where slurm/job.sh lies" >&2; exit 2; }

source=${1:?which run? sbatch slurm/linear_probe.sh RUN [key=value ...]}
logs=$source/logs
[[ -d $source ]] || logs=$(dirname "$source")/logs
run_job "$logs" linear-probe "$@"
