#!/usr/bin/env bash
# `ssl-pipeline train-detectron2` as a Slurm job: a detector fine-tuned from a run's backbone. From the repository's root:
#
#   sbatch slurm/detection_transfer.sh RUN [--datasets FOLDER] [--preset NAME] [SOLVER.BASE_LR=0.03 ...]
#                                                                              `ssl-pipeline train-detectron2 --help`
#
# Results go to RUN/results/detection.json. The Python that runs it has Detectron2: docs/detection.md says how to build it.
# It goes on in the next slot as pretraining does. On several nodes: --nodes=2; the batch of 16 must divide by the tasks.
#
# Yours to edit, or to give to sbatch; with ## it is a comment:
##SBATCH --partition=
##SBATCH --account=
#SBATCH --job-name=detection
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

source "${SLURM_SUBMIT_DIR:?is not set: sbatch runs this script}/slurm/job.sh" \
    || { echo "$0: submit it from the repository's root, where slurm/job.sh lies" >&2; exit 2; }

source=${1:?which run? sbatch slurm/detection_transfer.sh RUN}
logs=$source/logs
[[ -d $source ]] || logs=$(dirname "$source")/logs
run_job "$logs" train-detectron2 "$@"
