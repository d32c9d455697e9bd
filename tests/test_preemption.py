import os
import signal

import pytest
import torch

from ssl_pipeline.preemption import SIGNALS, Preemption
from tests.ranks import on_ranks


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_known_one_step_later_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a second one does no harm
        assert [preemption.requested(), preemption.requested()] == [False, True]
    assert signal.getsignal(number) == before


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
