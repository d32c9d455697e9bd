"""How a job ends: one enum of exit statuses, used by the loop, the scripts under slurm/ and the docs."""

import re
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
    """A checkpoint could not be written, or no room for one is left; or pictures could not be read for minutes."""
    RANK_LOST = 78
    """A rank died or hangs, ranks do not find each other, or preflight found nodes that cannot be worked with."""


class Stop(Exception):
    """Ends the job with `status` and one sentence instead of a traceback."""

    status = Status.CRASH
    of_all = False
    """Whether every rank raises one at the same place, so that none needs to be told of it."""


class BadInput(Stop):
    """The user's input (config key, path, file, world size) cannot work. The message names it and the way out."""

    status = Status.BAD_INPUT


class StorageFailure(Stop):
    """The run folder's disk refuses a checkpoint or has no room for one, or the pictures' storage does not answer."""

    status = Status.STORAGE

    @classmethod
    def of(cls, what: str, error: Exception) -> "StorageFailure":
        """The sentence for `error`, raised as `what` was written. torch hides the system's error behind one of its own."""
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).partition("\n")[0]
        return cls(f"cannot write {what}: {reason}; free room there or make it writable")


class RankLost(Stop):
    """Ranks or nodes that cannot be worked with."""

    status = Status.RANK_LOST


class NonFinite(Stop):
    """Loss or gradients stayed NaN or infinite, or an alarm ended the run."""

    status = Status.NON_FINITE


class Requeued(Stop):
    """The job gave itself back to the scheduler, which starts it again."""

    status = Status.STOPPED


def printable(text: str) -> str:
    """A line for a terminal or a log: what would end it, colour it or turn it round is shown as an escape.

    Names of files, and what lies in files of others, may hold anything.
    """
    controls = "[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
    return re.sub(controls, lambda found: found[0].encode("unicode_escape").decode(), text)
