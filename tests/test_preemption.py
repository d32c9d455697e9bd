import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ssl_pipeline import preemption
from ssl_pipeline.exits import Status, Stop
from ssl_pipeline.preemption import SIGNALS, Preemption
from tests.ranks import on_ranks


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    preemption._noted.clear()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_known_one_step_later_and_more_of_them_change_nothing(number: int) -> None:
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert [preemption.requested(), preemption.requested()] == [False, True]
        os.kill(os.getpid(), number)  # as while it saves
    os.kill(os.getpid(), number)  # and while the process ends: the handlers stayed


def test_handlers_come_back_after_a_run_that_was_not_stopped() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with Preemption() as preemption:
        assert not preemption.requested()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_signal_that_came_before_the_loop_is_answered_in_it() -> None:
    preemption.note_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    with Preemption() as within:
        assert [within.requested(), within.requested()] == [False, True]


def test_what_has_nothing_to_save_ends_with_75_at_sigterm_alone() -> None:
    preemption.stop_at_signals()
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the time limit is near: it may be done by then
        os.kill(os.getpid(), number)
    with pytest.raises(Stop, match="stopped by SIGTERM") as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.status == Status.STOPPED
    os.kill(os.getpid(), signal.SIGTERM)  # a second one takes no exit status
    preemption._noted.clear()
    preemption.note_signals()
    os.kill(os.getpid(), signal.SIGTERM)  # one that came before it was known that there is nothing to save
    with pytest.raises(Stop, match="stopped by SIGTERM"):
        preemption.stop_at_signals()


def test_handlers_stand_before_torch_is_imported() -> None:
    code = "import sys; from ssl_pipeline import cli, preemption; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _signalled_on_rank_one() -> torch.Tensor:
    from ssl_pipeline import distributed

    answers = []
    with Preemption() as preemption:
        for step in range(5):
            if step == 2 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(preemption.requested())
            if answers[-1]:
                break
    return torch.tensor(answers)


def test_all_ranks_decide_alike() -> None:
    for answers in on_ranks(2, _signalled_on_rank_one):
        assert answers.tolist() == [False, False, False, True]
