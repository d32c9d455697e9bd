#!/usr/bin/env bash
# Pretraining as a Slurm job. From the repository's root:
#
#   sbatch slurm/pretrain_imagenet.sh [CONFIG] [key=value ...]        default: imagenet/barlow_twins_sparsehead, 1000 epochs
#   sbatch --nodes=4 --time=8:00:00 slurm/pretrain_imagenet.sh imagenet/simclr_sparsehead data.root=/datasets/imagenet
#
# The pictures are at data.root, by default data/imagenet/{train,val}/<class>/ in the repository. RUN (environment) names the
# run folder; without it runs/<config>-<job id>. The same RUN goes on where it stopped: at the time limit, at preemption and at
# SIGTERM everything is saved and the job goes back into the queue. docs/slurm.md.
#
# Yours to edit, or to give to sbatch; with ## it is a comment:
##SBATCH --partition=
##SBATCH --account=
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

source "${SLURM_SUBMIT_DIR:?is not set: sbatch runs this script}/slurm/job.sh" \
    || { echo "$0: submit it from the repository's root, where slurm/job.sh lies" >&2; exit 2; }

config=imagenet/barlow_twins_sparsehead
if [[ $# -gt 0 && $1 != *=* ]]; then
    config=$1
    shift
fi
name=${config%.yaml}
RUN=${RUN:-runs/${name//\//_}-$first_job}
if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -f $RUN/config.yaml ]]; then
    config=$RUN/config.yaml # what the first start resolved: an edit of the repository's configs does not reach a run
    set --
fi
run_job "$RUN/logs" pretrain "$config" --output "$RUN" "$@"
