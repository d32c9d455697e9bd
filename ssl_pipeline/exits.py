"""How a job ends: one enum of exit statuses, used by the loop, the scripts under slurm/ and the docs."""

from enum import IntEnum


class Status(IntEnum):
    """Exit status of every `ssl-pipeline` verb. A scheduler should requeue on STOPPED and on nothing else."""

    DONE = 0
    CRASH = 1
    """A defect: Python printed a traceback."""
    BAD_INPUT = 2
    """Something the user gave cannot work; one sentence on stderr says what and the way out."""
    STOPPED = 75
    """A signal came; everything is in a checkpoint, and the same command goes on from it."""
    NON_FINITE = 76
    """Loss or gradients stayed NaN or infinite."""
    STORAGE = 77
    """A checkpoint could not be written, or no room for one is left."""
    RANK_LOST = 78
    """Ranks do not find each other, or preflight found nodes that cannot be worked with."""


class Stop(Exception):
    """Ends the job with `status` and one sentence instead of a traceback."""

    status = Status.CRASH


class BadInput(Stop):
    """The user's input (config key, path, file, world size) cannot work. The message names it and the way out."""

    status = Status.BAD_INPUT


class StorageFailure(Stop):
    """The run folder's disk refuses a checkpoint or has no room for one."""

    status = Status.STORAGE


class RankLost(Stop):
    """Ranks or nodes that cannot be worked with."""

    status = Status.RANK_LOST


class Requeued(Stop):
    """The job gave itself back to the scheduler, which starts it again."""

    status = Status.STOPPED
