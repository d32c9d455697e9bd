"""What every method is. A method is one file here; the file's name is its name; the loop never asks which one it runs.

A method's file holds its `Options`, its loss as a pure function, and its class `Method` with an `objective`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ssl_pipeline import config, distributed
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead


@dataclass
class Output:
    """What a step gives."""

    loss: Tensor
    """The scalar to differentiate, SparseHead's penalty included."""
    logs: dict[str, Tensor]
    """Scalars on the device, without gradient."""
    features: Tensor
    """Representations r of the first view, (N, D), detached."""
    embeddings: Tensor
    """Embeddings z of the first view, (N, K), detached."""


# DistributedDataParallel must find the loss in it: with a static graph its first step would average no gradient.
torch.export.register_dataclass(Output)


@dataclass
class Objective:
    """What a method computes; the base class makes an `Output` of it."""

    loss: Tensor
    embeddings: Tensor
    """z of the first view, (N, K)."""
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ViewNeeds:
    """Which views a method can use."""

    least: int = 2
    most: int | None = 2
    one_size: bool = True
    largest_first: int = 0
    """How many views, the first ones, must be as large as any."""

    def check(self, name: str, sizes: Sequence[int]) -> None:
        """Raises BadInput where views of `sizes` do not fit; `name` is the method's."""
        if len(sizes) < self.least or (self.most is not None and len(sizes) > self.most):
            wanted = f"{self.least}" if self.most == self.least else f"{self.least} to {self.most or 'any number of'}"
            raise BadInput(
                f"{name} uses {wanted} views and data.views makes {len(sizes)}: mend the counts in data.views"
            )
        if self.one_size and len(set(sizes)) > 1:
            raise BadInput(f"{name} needs views of one size and data.views makes sizes {sorted(set(sizes))}")
        if any(size < max(sizes) for size in sizes[: self.largest_first]):
            raise BadInput(
                f"{name} needs its {self.largest_first} views of full size first and data.views makes sizes {list(sizes)}: "
                "put the largest at the beginning of data.views"
            )


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all numbers count from 0."""

    step: int
    steps: int
    """Steps of the whole run."""
    epoch: int
    epochs: int

    @property
    def done(self) -> float:
        """Share of the run's steps that are done."""
        return self.step / self.steps


class Method(nn.Module):
    """Backbone, projection head and objective; subclasses implement `objective`.

    Args:
        options: the method's own Options.
        backbone: images (N, 3, S, S) -> (N, D), with the attribute `num_features`.
        head: (N, D) -> (N, K).
    """

    seed: int = 0
    """Key of what the method draws; the run's."""
    progress: Progress = Progress(step=0, steps=1, epoch=0, epochs=1)
    """Of the step that is being made."""
    gradient_scale: float = 1.0
    """Factor on the whole gradient, not on the value; 1 but for a quirk that a recipe was tuned with."""
    per_sample: bool = False
    """Whether the loss is a mean over samples that meet in batch norm alone, and so the mean over micro-batches too."""

    def __init__(self, options: Any, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.head = head
        # What the inner steps train the optimizer and DistributedDataParallel must not see.
        self._inner: list[nn.Parameter] = []
        if head.options.sparse.inner_steps:
            self._inner = [p for p in head.parameters() if p.requires_grad]
            head.requires_grad_(False)
            self.per_sample = False  # the head is trained on the whole batch before any of it is looked at

    @staticmethod
    def views(options: Any) -> ViewNeeds:
        """Which views the method can use."""
        return ViewNeeds()

    @staticmethod
    def check(options: Any, head: HeadOptions, batch_size: int) -> None:
        """Raises BadInput where the method cannot work with a head or a global batch; called when a config is read."""

    def represent(self, views: list[Tensor]) -> list[Tensor]:
        """Representations r of V views (N, 3, S, S), (N, D) each. Each view is forwarded by itself unless overridden."""
        return [self.backbone(view) for view in views]

    def targets(self, views: list[Tensor]) -> list[Tensor]:
        """What the objective compares with and neither backbone nor head makes; without gradient, once a step."""
        return []

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        """The method's loss of representations (N, D), and of what `targets` gave."""
        raise NotImplementedError

    def forward(self, views: list[Tensor], micro_batches: int = 1) -> Output:
        """The objective and, in the weight's own precision, SparseHead's penalty on the online head.

        `represent` and `targets` take the rows of the views in so many `micro_batches`, the objective takes them all.
        """
        features, targets = self._represent_in_parts(views, micro_batches)
        before = {}
        if self._inner and self.training and torch.is_grad_enabled():  # a training step, not a look at the loss
            before["loss_before_inner"] = self._inner_steps([feature.detach() for feature in features], targets)
        result = self.objective(features, targets)
        loss, logs = result.loss, {"loss": result.loss.detach(), **before, **result.logs}
        logs |= self._watched(loss, result.embeddings)
        if self.head.sparse_layers and not self._inner:
            with full_precision(loss):
                loss = self._penalized(loss)
        if self.gradient_scale != 1:
            loss = self.gradient_scale * loss + (1 - self.gradient_scale) * loss.detach()
        return Output(loss, logs, features[0].detach(), result.embeddings.detach())

    def join(self, outputs: list[Output]) -> Output:
        """The output of a step from those of its micro-batches, of equal size, where the loss is `per_sample`."""
        if len(outputs) == 1:
            return outputs[0]
        logs = {name: torch.stack([output.logs[name] for output in outputs]).mean(dim=0) for name in outputs[0].logs}
        features, embeddings = (torch.cat([getattr(o, name) for o in outputs]) for name in ("features", "embeddings"))
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        return Output(loss, logs | self._watched(logs["loss"], embeddings), features, embeddings)

    def _represent_in_parts(self, views: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
        """`represent` and `targets` of the views, of whose activations those of one part of the rows are held at a time.

        The backward pass represents a part again when it comes to it: GradCache (Gao et al. 2021, arXiv 2101.06983,
        section 3.2) as one graph. Batch norm sees a part at a time and counts it once.
        """
        if count == 1:
            return self.represent(views), self.targets(views)
        features, targets = [], []
        for part in map(list, zip(*(view.chunk(count) for view in views), strict=True)):
            # Not reentrant: DistributedDataParallel then sees one backward pass like any other.
            features.append(checkpoint(self.represent, part, use_reentrant=False, context_fn=self._first_and_again))
            targets.append(self.targets(part))
        whole = [[torch.cat(rows) for rows in zip(*parts, strict=True)] for parts in (features, targets)]
        return whole[0], whole[1]

    def _first_and_again(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Contexts of a part's first pass and of the repeated one, which no running statistic counts again."""
        return contextlib.nullcontext(), copied_buffers(self.backbone)

    @torch.no_grad()
    def _watched(self, loss: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        """What is logged of every method, from its loss without the penalty and embeddings (N, K)."""
        with full_precision(embeddings):
            logs = {"embedding_std": embedding_std(upcast(embeddings))}
            logs["embedding_rank"] = participation_ratio(upcast(embeddings))
            if self.head.sparse_layers:
                logs |= self.head.sparse.logs(self.head.sparse_layers, self.progress.done, loss)
        return logs

    def _penalized(self, loss: Tensor) -> Tensor:
        sparse = self.head.sparse
        return loss + sparse.penalty(self.head.sparse_layers, self.progress.done) if sparse.in_the_loss else loss

    def _inner_steps(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Equation 13: train the head alone on fixed features, on loss + penalty, by SGD without momentum or decay.

        The head normalises by the statistics of the batch; its running ones, and all other buffers, stay as they are.
        The loss is the exact one, whatever `gradient_scale`. Returns it as it was before.
        """
        options = self.head.options.sparse
        # The backbone's have no part in it, and backward still needs them as they are.
        buffers = [b for name, b in self.named_buffers() if not name.startswith("backbone.")]
        copies = [buffer.clone() for buffer in buffers]
        first = None
        for _ in range(options.inner_steps):
            for p in self._inner:
                p.requires_grad_()
            loss = self.objective(features, targets).loss
            first = loss.detach() if first is None else first
            with full_precision(features[0]):
                gradients = torch.autograd.grad(self._penalized(loss), self._inner)
            with torch.no_grad():
                for p, gradient in zip(self._inner, gradients, strict=True):
                    p.requires_grad_(False)
                    p.sub_(distributed.mean_over_ranks(gradient), alpha=options.inner_lr)
                self.head.sparse.threshold(self.head.sparse_layers, self.progress.done, options.inner_lr)
                if buffers:
                    torch._foreach_copy_(buffers, copies)
            torch.clear_autocast_cache()  # of the weights as they were before this step
        assert first is not None
        return first

    def changed_by_forward(self) -> list[Tensor]:
        """What a forward pass changes before anyone knows whether it was finite: batch statistics, say."""
        return [*self.buffers(), *self._inner]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer: {params, name, decay, adapt, lr}.

        `decay` and `adapt` say whether weight decay and LARS's adaptation apply where an optimizer excludes anything;
        `lr` is "scheduled", "constant" for the base rate without warm-up and decay, or a constant rate of its own.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        return [
            {"params": matrices, "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
            {"params": vectors, "name": "vectors", "decay": False, "adapt": False, "lr": "scheduled"},
        ]

    def before_forward(self, progress: Progress) -> None:
        """Called before the forward pass."""
        self.progress = progress

    def generator(self, purpose: int = 0) -> torch.Generator:
        """Draws on the host that are a function of (seed, step, purpose): the same on all ranks, and after a resume."""
        key = np.random.SeedSequence((self.seed, self.progress.step, purpose)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(key[0]) >> 1)

    def before_update(self, progress: Progress) -> None:
        """Called after backward and before the optimizer."""

    def after_update(self, progress: Progress, learning_rates: dict[str, float], finite: Tensor) -> None:
        """Called after the optimizer. `finite`, a boolean on the device, tells whether the update took place.

        Whoever overrides it calls this one first, which is SparseHead's.
        """
        sparse, layers = self.head.sparse, self.head.sparse_layers
        if sparse.options.mode == "proximal" and not self._inner:
            # The scale of the gradient, which a penalty in the loss would have too.
            step_size = self.gradient_scale * learning_rates["matrices"]
            sparse.threshold(layers, progress.done, step_size * finite.float())
        sparse.adapt(layers, finite)

    def evaluated_backbone(self) -> nn.Module:
        """What backbone.pth holds."""
        return self.backbone


@contextlib.contextmanager
def copied_buffers(module: nn.Module) -> Iterator[None]:
    """A context in which `module` changes copies of its buffers, which are then dropped.

    Copies in place of the buffers, not values put back: autograd holds the buffers for its backward pass.
    """
    held = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    for part, buffers in held:
        part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in held:
            part._buffers.update(buffers)


def embedding_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the deviation of z / ||z||, times sqrt(K), of the rows of z (N, K).

    1 for embeddings spread over the whole sphere, 0 for a collapse to a point.
    Source: Chen and He 2021 (arXiv 2011.10566), section 4.1.
    """
    normalized = nn.functional.normalize(z, dim=1)
    return normalized.std(dim=0).mean() * normalized.shape[1] ** 0.5


def participation_ratio(z: Tensor) -> Tensor:
    """(tr C)^2 / ||C||_F^2 of the covariance C of the rows of z (N, K): how many dimensions they fill.

    1 on a line, k where k directions have equal variance, at most N - 1; 0 where all rows are equal. It is the
    participation ratio of C's eigenvalues; ||C||_F is taken from the inner products of rows, (N, N), or of columns.
    """
    centred = z - z.mean(dim=0)
    gram = centred @ centred.T if len(z) < z.shape[1] else centred.T @ centred
    return gram.trace().square() / gram.square().sum().clamp(min=torch.finfo(z.dtype).tiny)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = ctx.saved_tensors
        return None, *(scale * gradient for gradient in gradients), *(None for _ in gradients)


def with_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradients by `inputs` were made along with it: backward multiplies them, and cannot be differentiated.

    So nothing but them is kept for backward, and no collective is made in it: `gradients` are of the sum of all ranks'
    values, and what comes in must be equal on all ranks.
    """
    return _WithGradients.apply(value, *inputs, *gradients)


def full_precision(like: Tensor) -> torch.autocast:
    """A context without autocast on the device of `like`: losses are computed in fp32, or float64 if given."""
    return torch.autocast(like.device.type, enabled=False)


def upcast(x: Tensor) -> Tensor:
    """x in fp32 where it is in half precision, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def to_device(x: Tensor, like: Tensor) -> Tensor:
    """x, drawn on the host, on the device of `like`; the host does not wait."""
    pinned = x.pin_memory() if like.device.type == "cuda" else x
    return pinned.to(like.device, non_blocking=True)


def get(name: str) -> type[Method]:
    """The class of a method. Its name must be one of config.method_names()."""
    return importlib.import_module(f"ssl_pipeline.methods.{name}").Method


def build(options: config.Options, backbone: nn.Module, head: ProjectionHead, seed: int = 0) -> Method:
    """The method that `options.name` names."""
    method = get(options.name)(options, backbone, head)  # type: ignore[attr-defined]
    method.seed = seed
    return method
