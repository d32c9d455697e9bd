"""Work for the processes of test_check.py: a module of its own, since each process imports it."""

import os

from ssl_pipeline.exits import BadInput


def deadly(job: int) -> int:
    """The square, but 7 and 17 end the process."""
    if job % 10 == 7:
        os._exit(3)
    return job * job


def wrong(job: int) -> int:
    """What a worker raises."""
    raise BadInput(f"{job} does not do")
