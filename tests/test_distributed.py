import copy
import multiprocessing as mp
import os
import socket
from datetime import timedelta

import pytest
import timm
import torch
from torch import nn

from ssl_pipeline import distributed
from ssl_pipeline.exits import BadInput, Status, Stop
from tests.ranks import on_ranks


def _collectives() -> dict[str, torch.Tensor]:
    rank = distributed.rank()
    x = torch.tensor([[1.0 + rank, 2.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    gathered = distributed.gather(x)
    ((rank + 1) * gathered * weights).sum().backward()
    y = torch.tensor([3.0 + rank], requires_grad=True)
    total = distributed.all_reduce_sum(y)
    ((rank + 1) * total).sum().backward()
    z = torch.tensor([3.0 + rank], requires_grad=True)
    shared = distributed.global_sum(z)
    (5 * shared).sum().backward()
    return {"gathered": gathered.detach(), "x": x.grad, "total": total.detach(), "y": y.grad,
            "shared": shared.detach(), "z": z.grad,
            "mean": distributed.mean_over_ranks(torch.tensor(float(rank))),
            "values": distributed.gather_values(torch.tensor([rank]))}  # fmt: skip


def test_collectives_and_their_gradients() -> None:
    for rank, found in enumerate(on_ranks(2, _collectives)):
        assert found["gathered"].tolist() == [[1, 2], [2, 2]]
        assert found["x"].tolist() == [[[3, 30], [300, 3000]][rank]]  # summed over ranks: (1 + 2) * weight
        assert found["total"].tolist() == [7]
        assert found["y"].tolist() == [3]
        assert found["shared"].tolist() == [7]
        assert found["z"].tolist() == [10]
        assert found["mean"] == 0.5
        assert found["values"].tolist() == [[0], [1]]


def _norms() -> list[torch.Tensor]:
    torch.manual_seed(1)
    whole = torch.randn(12, 6, 5, 5, dtype=torch.float64) * 3 + 7
    target = torch.randn(12, 6, 5, 5, dtype=torch.float64)
    module = nn.Sequential(nn.BatchNorm2d(6)).double()
    module[0].weight.data.uniform_(0.5, 2)
    module = distributed.synchronise_batch_norm(module, torch.device("cpu"))
    x = whole[distributed.rank() :: distributed.world_size()].clone().requires_grad_()
    for _ in range(2):
        y = module(x)
    (y * target[distributed.rank() :: distributed.world_size()]).sum().backward()
    module.eval()
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()], *module.buffers(), module(x).detach()]


def test_batch_norm_over_ranks_is_batch_norm_of_the_whole() -> None:
    whole = _norms()
    ranks = on_ranks(2, _norms)
    for place, name in ((0, "output"), (1, "gradient of the input"), (7, "evaluation")):
        joined = torch.stack([r[place] for r in ranks], dim=1).flatten(0, 1)
        torch.testing.assert_close(joined, whole[place], rtol=1e-10, atol=1e-12, msg=name)
    for place in (2, 3):  # each rank has the part of its own rows
        torch.testing.assert_close(ranks[0][place] + ranks[1][place], whole[place], rtol=1e-10, atol=1e-12)
    for place in (4, 5, 6):
        torch.testing.assert_close(ranks[0][place], whole[place], rtol=1e-10, atol=1e-12)


def test_batch_norm_keeps_names_and_serves_without_affine() -> None:
    old = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4, affine=False))
    names = list(old.state_dict())
    new = distributed._global_batch_norm(old)
    assert list(new.state_dict()) == names
    assert all(isinstance(m, distributed.BatchNorm) for m in new)
    x = torch.randn(8, 4)
    torch.testing.assert_close(new[1](x), nn.BatchNorm1d(4, affine=False)(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert new[0](torch.randn(2, 4, 3, 3).bfloat16()).dtype == torch.bfloat16


def _stopping() -> str:
    def action() -> int:
        if distributed.rank() == 1:
            raise BadInput("the folder of rank 1 is missing")
        return 5

    try:
        distributed.together(action)
    except Stop as stop:
        return f"{int(stop.status)} {stop}"
    return "went on"


def test_all_stop_where_one_does_and_the_main_one_says_which() -> None:
    first, second, third = on_ranks(3, _stopping)
    assert first == f"2 rank 1 on {socket.gethostname()}: the folder of rank 1 is missing"
    assert (second, third) == ("2 the folder of rank 1 is missing", "2 ")
    assert distributed.together(lambda: 7) == 7


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[03-05,9],login1", "gpu03"), ("node1", "node1"), ("a1,a2", "a1"), ("r[1,4]n", "r1n")]
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert distributed._first_host(nodes) == first


def test_place_from_torchrun_slurm_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert distributed._place() == (0, 1, 0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert distributed._place() == (0, 1, 0, 1)  # a batch script or shell, not srun
    slurm = {"STEP_NUM_TASKS": "8", "STEP_NODELIST": "n[1-2]", "JOB_ID": "77", "STEP_ID": "1", "LOCALID": "1",
             "STEP_TASKS_PER_NODE": "4(x2)"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_ADDR")
    assert distributed._place() == (5, 8, 1, 4)
    assert "MASTER_ADDR" not in os.environ  # the ranks look for each other
    monkeypatch.setenv("MASTER_PORT", "5000")  # unless somebody knows better
    assert distributed._place() == (5, 8, 1, 4)
    assert os.environ["MASTER_ADDR"] == "n1"
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert distributed._place() == (3, 4, 1, 2)


def test_timms_norms_keep_their_activations() -> None:
    torch.manual_seed(0)
    old = timm.create_model("regnety_002", num_classes=0)
    x = torch.randn(4, 3, 64, 64)
    training = old.train()(x)
    new = distributed._global_batch_norm(copy.deepcopy(old))
    assert list(new.state_dict()) == list(old.state_dict())
    torch.testing.assert_close(new(x), training, rtol=1e-3, atol=1e-3)
    old(x)  # its statistics have then seen as many batches
    torch.testing.assert_close(new.eval()(x), old.eval()(x), rtol=1e-2, atol=1e-2)


def _unions() -> list[list[int]]:
    mine = [[], [7, 3], [9]][distributed.rank()]
    return [sorted(distributed.union(mine)), sorted(distributed.union([]))]


def test_union_over_ranks() -> None:
    assert on_ranks(3, _unions) == [[[3, 7, 9], []]] * 3


def _crashing() -> list[int]:
    def action() -> None:
        if distributed.rank() == 0:
            raise ZeroDivisionError

    try:
        distributed.together(action)
    except ZeroDivisionError:
        return [0]
    except Stop as stop:
        return [int(stop.status)]
    return [-1]


def test_a_crash_on_one_rank_stops_the_others() -> None:
    assert on_ranks(2, _crashing) == [[0], [Status.CRASH]]


# -------------------------------------------------------------------------------------------------- meeting under Slurm
def test_ports_differ_between_jobs_steps_and_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for job, step, restart in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        for name, value in (("JOB_ID", job), ("STEP_ID", step), ("RESTART_COUNT", restart)):
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        ports = distributed._slurm_ports()
        assert len(set(ports)) == 4
        assert all(10000 <= port < 30000 for port in ports)  # below those that the system hands out
        seen.add(tuple(ports))
    assert len(seen) == 4


def _met(rank: int, ports: list[int], found: "mp.Queue") -> None:
    os.environ |= {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}
    store = distributed._meet(rank, 2, "127.0.0.1", ports, timedelta(seconds=60))
    if rank == 0:
        store.set("word", "hello")
        store.wait(["read"])
        found.put(store.port)
    else:
        found.put(store.get("word").decode())
        store.set("read", "yes")


@pytest.mark.slow
def test_ranks_meet_though_another_program_holds_the_first_port() -> None:
    context = mp.get_context("spawn")
    found = context.Queue()
    with socket.socket() as foreign, socket.socket() as free:
        for one in (foreign, free):
            one.bind(("127.0.0.1", 0))
        foreign.listen()  # accepts, and never answers
        ports = [foreign.getsockname()[1], free.getsockname()[1]]
        free.close()
        ranks = [context.Process(target=_met, args=(rank, ports, found)) for rank in range(2)]
        for one in ranks:
            one.start()
        assert {found.get(timeout=90), found.get(timeout=90)} == {"hello", ports[1]}
        for one in ranks:
            one.join(30)


def test_ranks_that_do_not_meet_say_where_they_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(Stop, match=f"rank 1 does not find the other ranks at 127.0.0.1, ports {port}"):
        distributed._meet(1, 2, "127.0.0.1", [port], timedelta(seconds=1))


# -------------------------------------------------------------------------------------------------------- small things
def _gathered() -> list:
    return distributed.gather_json({"rank": distributed.rank(), "text": "ä" * distributed.rank()})


def test_plain_data_of_all_ranks() -> None:
    for found in on_ranks(3, _gathered):
        assert found == [{"rank": rank, "text": "ä" * rank} for rank in range(3)]


def _means_of(layouts: list[list[int]]) -> list[torch.Tensor]:
    """The mean over the ranks of the same numbers, standing at different places of a bucket."""
    torch.manual_seed(distributed.rank())
    numbers = torch.randn(999) * 10.0 ** torch.randint(-3, 4, (999,))
    found = []
    for layout in layouts:
        whole = torch.cat([numbers[place::3] for place in layout])

        class Bucket:
            def buffer(self, whole: torch.Tensor = whole) -> torch.Tensor:
                return whole

        mean = distributed._mean_in_rank_order(None, Bucket()).wait()
        parts = dict(zip(layout, mean.chunk(3), strict=True))
        found.append(torch.cat([parts[place] for place in range(3)]))
    return found


@pytest.mark.slow
def test_the_mean_of_gradients_does_not_depend_on_the_order_of_the_bucket() -> None:
    for first, second in on_ranks(4, _means_of, [[0, 1, 2], [2, 0, 1]]):
        assert torch.equal(first, second)


def _turns(folder: str) -> list[int]:
    """The ranks that were before this one; the node's first ranks are 0 and 2."""
    rank = distributed.rank()
    os.environ["LOCAL_RANK"] = str(rank % 2)

    def act() -> list[int]:
        there = sorted(int(name) for name in os.listdir(folder))
        open(os.path.join(folder, str(rank)), "w").close()
        return there

    return distributed.in_turn(act)


def test_the_main_rank_comes_first_then_one_of_each_node_then_the_rest(tmp_path) -> None:
    found = on_ranks(4, _turns, str(tmp_path))
    assert found[0] == []
    assert found[2] == [0]
    assert {0, 2} <= set(found[1])
    assert {0, 2} <= set(found[3])
