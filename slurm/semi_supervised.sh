#!/usr/bin/env bash
# `ssl-pipeline semi-supervised` as a Slurm job. From the repository's root:
#
#   sbatch slurm/semi_supervised.sh RUN --percent 1 [--preset NAME] [--sweep]            `ssl-pipeline semi-supervised --help`
#
# Results go to RUN/results. ImageNet's lists of labelled pictures must be there before: the first lines of the log say where.
# It goes on in the next slot as pretraining does. docs/slurm.md, docs/evaluation.md.
#
# Yours to edit, or to give to sbatch; with ## it is a comment:
##SBATCH --partition=
##SBATCH --account=
#SBATCH --job-name=semi-supervised
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

source=${1:?which run? sbatch slurm/semi_supervised.sh RUN --percent 1}
logs=$source/logs
[[ -d $source ]] || logs=$(dirname "$source")/logs
run_job "$logs" semi-supervised "$@"
