"""SwAV's own state: prototypes, queue, views of several sizes, and how its failure shows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pipeline import config, distributed, head, optim, sparse_head
from ssl_pipeline.exits import BadInput
from ssl_pipeline.methods import Progress, swav
from ssl_pipeline.methods.swav import sinkhorn, swav_loss
from ssl_pipeline.pretrain import PretrainConfig
from tests.ranks import on_ranks

STEPS = 12
PER_EPOCH = 3


def tiny(**more: object) -> swav.Method:
    """A network of one convolution, 8 features, embeddings of 5 dimensions, 7 prototypes, in float64.

    No biases before batch norm: their gradient is zero but for rounding, which LARC scales up.
    """
    torch.manual_seed(1)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    options = config.validate(swav.Options, {"name": "swav", "prototypes": 7, "freeze_prototypes_steps": 0, **more})
    projection = head.ProjectionHead(head.Options(hidden=6, output=5, hidden_bias=False), 8)
    method = swav.Method(options, backbone, projection).double()
    method._normalise_prototypes()  # to float64's precision
    return method


def pictures(step: int, rows: int = 8, sizes: tuple[int, ...] = (12, 12, 8, 8, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(rows, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


def at(step: int) -> Progress:
    return Progress(step, STEPS, step // PER_EPOCH, STEPS // PER_EPOCH)


# ---------------------------------------------------------------------------------------------------------- assignments
def test_sinkhorn_shares_the_rows_among_the_prototypes() -> None:
    scores = torch.randn(40, 8, dtype=torch.float64).tanh()
    found = sinkhorn(scores, 0.05, 2000)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(found.sum(dim=0), torch.full((8,), 5.0, dtype=torch.float64), rtol=1e-3, atol=0)
    # It is diag(u) exp(scores / epsilon) diag(v): in the logarithm, what is left has rank one, so mixed differences vanish.
    rest = found.log() - scores / 0.05
    mixed = rest - rest[:1] - rest[:, :1] + rest[:1, :1]
    assert mixed.abs().max() < 1e-9


def test_sinkhorn_knows_no_order_and_takes_views_apart() -> None:
    scores = torch.randn(2, 12, 7, dtype=torch.float64).tanh()
    order = torch.randperm(12)
    found = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(sinkhorn(scores[:, order], 0.05, 3), found[:, order], rtol=1e-12, atol=1e-14)
    for view in range(2):
        torch.testing.assert_close(sinkhorn(scores[view], 0.05, 3), found[view], rtol=1e-12, atol=1e-14)


def test_sinkhorn_in_fp32_at_the_ends_of_its_range() -> None:
    scores = torch.where(torch.rand(64, 300) < 0.5, -1.0, 1.0)
    scores[0], scores[:, 0] = -1, -1
    found = sinkhorn(scores, 0.025, 3)
    torch.testing.assert_close(found.double(), sinkhorn(scores.double(), 0.025, 3), rtol=1e-3, atol=1e-6)


def test_the_loss_is_the_mean_over_pairs_of_views() -> None:
    scores, assignments = torch.randn(5, 6, 7), torch.rand(2, 6, 7)
    pairs = [(a, v) for a in range(2) for v in range(5) if v != a]
    cross = [-(assignments[a] * (scores[v] / 0.1).softmax(1).log()).sum(1).mean() for a, v in pairs]
    torch.testing.assert_close(swav_loss(scores, assignments, 0.1), torch.stack(cross).mean())


# ---------------------------------------------------------------------------------------------------------------- views
def test_views_of_one_size_are_one_batch_and_the_head_sees_all() -> None:
    method = tiny()
    views = pictures(0)
    output = method(views)
    assert method.backbone[1].num_batches_tracked == 2  # two sizes
    assert method.head.layers[1].num_batches_tracked == 1
    fresh = tiny()
    features = torch.cat([fresh.backbone(torch.cat(views[:2])), fresh.backbone(torch.cat(views[2:]))])
    scores = fresh.prototypes(F.normalize(fresh.head(features), dim=1)).reshape(5, 8, 7)
    assignments = torch.stack([sinkhorn(scores[view].detach(), 0.05, 3) for view in range(2)])
    expected = swav_loss(scores, assignments, 0.1)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.features, features[:8], rtol=1e-12, atol=0)
    output.loss.backward()
    expected.backward()
    for (name, p), q in zip(method.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-14, msg=name)


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    for overrides, words in (
        (["method.queue_length=600"], "queue_length = 600 is no multiple of data.batch_size = 64: take 576 or 640"),
        (["method.queue_length=50"], "queue_length = 50 .* data.batch_size = 64: take no queue, 0, or 64"),
        (["data.views.0.count=1"], "swav uses 2 to any number of views and data.views makes 1"),
        (["method.epsilon=0.001"], "method.epsilon"),
    ):
        with pytest.raises(BadInput, match=words):
            config.validate(PretrainConfig, config.load("digits/swav", overrides).values)


# ----------------------------------------------------------------------------------------------------------- prototypes
def run(method: swav.Method, optimizer: torch.optim.Optimizer, step: int, finite: bool = True) -> Tensor:
    """A step of the loop; returns the loss."""
    method.before_forward(at(step))
    output = method(pictures(step))
    output.loss.backward()
    method.before_update(at(step))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0 if finite else 1.0)
    optimizer.step()
    method.after_update(at(step), {}, torch.tensor(finite))
    optimizer.zero_grad()
    return output.loss.detach()


@pytest.mark.parametrize("name", ["larc", "adam"])
def test_prototypes_rest_at_first_and_are_of_unit_length_always(name: str) -> None:
    method = tiny(freeze_prototypes_steps=3)
    options = optim.Options(name=name, learning_rate=0.5, weight_decay=0.1, exclude_1d=False, trust_coefficient=0.1)
    optimizer = optim.build(method.parameter_groups(), options, 8)
    weight = method.prototypes.weight
    ones = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(weight.norm(dim=1), ones)
    first, encoder = weight.detach().clone(), method.backbone[0].weight.detach().clone()
    for step in range(3):
        run(method, optimizer, step)
        assert torch.equal(weight, first)
        state = optimizer.state.get(weight, {})
        assert all(value.abs().sum() == 0 for value in state.values())  # momentum rests too
    assert not torch.equal(method.backbone[0].weight, encoder)
    run(method, optimizer, 3)
    assert (weight.detach() - first).abs().max() > 1e-3
    torch.testing.assert_close(weight.norm(dim=1), ones)
    before = weight.detach().clone()
    run(method, optimizer, 4, finite=False)
    assert torch.equal(weight, before)


def test_sparsehead_leaves_prototypes_alone() -> None:
    found = []
    for weight in (0.0, 0.1):
        method = tiny()
        method.head.sparse = sparse_head.SparseHead(sparse_head.Options(weight=weight))
        method(pictures(0)).loss.backward()
        found.append((method.prototypes.weight.grad, method.head.last_layer.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_the_known_failure_shows() -> None:
    method = tiny()
    spread = method(pictures(0)).logs["loss_over_ln_k"]
    assert abs(spread - 1) > 0.05
    with torch.no_grad():  # every embedding as near to one prototype as to another
        method.prototypes.weight.copy_(method.prototypes.weight[:1].expand(7, -1).clone())
    output = method(pictures(0))
    torch.testing.assert_close(output.loss.item(), math.log(7))
    torch.testing.assert_close(output.logs["loss_over_ln_k"].item(), 1.0)


# ---------------------------------------------------------------------------------------------------------------- queue
def test_the_queue_fills_unused_and_is_used_when_full_newest_first() -> None:
    """Against the rule of main_swav.py:train: in use once its last slot is no longer zero."""
    method = tiny(queue_length=24, queue_start_epoch=1)
    queue: Tensor | None = None
    used = []
    for step in range(STEPS):
        method.before_forward(at(step))
        views = pictures(step)
        with torch.no_grad():
            z = F.normalize(method.head(torch.cat([method.backbone(torch.cat(views[:2])),
                                                   method.backbone(torch.cat(views[2:]))])), dim=1).reshape(5, 8, 5)  # fmt: skip
            scores = method.prototypes(z)
            if step >= PER_EPOCH and queue is None:
                queue = torch.zeros(2, 24, 5, dtype=torch.float64)
            assignments = []
            for view in range(2):
                out = scores[view]
                if queue is not None:
                    if queue[view, -1].any():
                        out = torch.cat([method.prototypes(queue[view]), out])
                        used.append(step)
                    queue[view] = torch.cat([z[view], queue[view, :-8]])
                assignments.append(sinkhorn(out, 0.05, 3)[-8:])
            expected = swav_loss(scores, torch.stack(assignments), 0.1)
        torch.testing.assert_close(method(views).loss.detach(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(method.queue, torch.zeros_like(method.queue) if queue is None else queue)
    assert sorted(set(used)) == list(range(6, STEPS))  # three steps of filling from step 3 on


def whole_run() -> dict[str, Tensor]:
    """Twelve steps with queue and resting prototypes: losses, weights, the queue with each batch's entries sorted."""
    world = distributed.start()
    method = tiny(queue_length=24, queue_start_epoch=1, freeze_prototypes_steps=2)
    model = distributed.wrap(method, world.device)
    options = optim.Options(name="larc", learning_rate=0.5, exclude_1d=False, trust_coefficient=0.01)
    optimizer = optim.build(method.parameter_groups(), options, 8)
    losses, rested = [], []
    first = method.prototypes.weight.detach().clone()
    for step in range(STEPS):
        method.before_forward(at(step))
        output = model([view[world.rank :: world.size] for view in pictures(step)])
        output.loss.backward()
        method.before_update(at(step))
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        method.after_update(at(step), {}, torch.tensor(True))
        optimizer.zero_grad()
        losses.append(distributed.mean_over_ranks(output.loss))
        rested.append((method.prototypes.weight.detach() == first).all())
    entries = method.queue.unflatten(1, (3, 8))  # (views, batches, rows, dimensions)
    order = entries[..., :1].argsort(dim=2).expand_as(entries)
    state = {name: value for name, value in method.state_dict().items() if name != "queue"}
    return {**state, "losses": torch.stack(losses), "queue": entries.gather(2, order), "rested": torch.stack(rested)}


def test_two_ranks_with_a_queue_equal_one() -> None:
    one = whole_run()
    assert one["rested"].tolist() == [True] * 2 + [False] * (STEPS - 2)
    ranks = on_ranks(2, whole_run)
    for found in ranks:
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    # A checkpoint holds rank 0's buffers: the ranks must agree to the last bit.
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"])
