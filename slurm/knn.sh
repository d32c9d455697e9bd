#!/usr/bin/env bash
# `ssl-pipeline knn` as a Slurm job. From the repository's root:
#
#   sbatch slurm/knn.sh RUN [key=value ...]            or a file of weights and --config NAME; `ssl-pipeline knn --help`
#
# Results go to RUN/results. After a preemption it starts again; at its time limit it ends: give it more --time. docs/slurm.md.
#
# Yours to edit, or to give to sbatch; with ## it is a comment:
##SBATCH --partition=
##SBATCH --account=
#SBATCH --job-name=knn
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=2:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

source "${SLURM_SUBMIT_DIR:?is not set: sbatch runs this script}/slurm/job.sh" \
    || { echo "$0: submit it from the repository's root, where slurm/job.sh lies" >&2; exit 2; }

source=${1:?which run? sbatch slurm/knn.sh RUN [key=value ...]}
logs=$source/logs
[[ -d $source ]] || logs=$(dirname "$source")/logs
run_job "$logs" knn "$@"
