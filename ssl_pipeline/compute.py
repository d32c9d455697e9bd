"""How a step is computed: compiled, with activations computed again, with fewer bytes between ranks. What is computed stays the
same but for rounding, and so do all names in checkpoints and exports.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_pipeline import config, distributed
from ssl_pipeline.exits import BadInput
from ssl_pipeline.methods import Method, copied_buffers


class Options(config.Options):
    """May differ when a run is started again."""

    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile's mode for backbones and heads. `reduce-overhead` and `max-autotune` record CUDA graphs on a GPU."""
    checkpoint_activations: bool = False
    """Whether each block of the backbone gives its activations up and computes them again in the backward pass: less memory
    for about a third more time (Chen et al. 2016, arXiv 1604.06174)."""
    static_graph: bool = False
    """DistributedDataParallel's: whether it may take each step's graph to be the first one's."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """`bf16`: ranks send each other gradients in bf16, half the bytes; the mean is taken in fp32 on a CPU, in
    bf16 by NCCL."""

    @field_validator("compile", mode="before")
    @classmethod
    def _off_is_false_in_yaml(cls, value: Any) -> Any:
        return "none" if value is False else value

    @model_validator(mode="after")
    def _compiled_or_repeated(self) -> Options:
        if self.compile != "none" and self.checkpoint_activations:
            raise ValueError(
                "torch.compile does not see into blocks that are computed again: take compile=none or "
                "checkpoint_activations=false"
            )
        return self

    @property
    def records_graphs(self) -> bool:
        """Whether CUDA graphs are recorded where there is CUDA."""
        return self.compile in ("reduce-overhead", "max-autotune")


def require_possible(options: Options, accumulate: int, per_sample: bool) -> None:
    """Raises BadInput where `accumulate` micro-batches forbid an option; `per_sample` is the method's."""
    if accumulate > 1 and options.records_graphs:
        raise BadInput(
            f"compute.compile = {options.compile} records CUDA graphs, whose outputs the next micro-batch overwrites: take "
            "compute.compile=default or optim.accumulate=1"
        )
    if accumulate > 1 and options.static_graph and per_sample:
        raise BadInput(
            "compute.static_graph does not know passes without an exchange of gradients, which this method's micro-batches "
            "are: take compute.static_graph=false or optim.accumulate=1"
        )


def require_compiler(options: Options, device: torch.device) -> None:
    """Raises BadInput where torch.compile would not find what it needs on this machine."""
    if options.compile == "none":
        return
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[variable]] if variable in os.environ else names
    lacking = []
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        lacking.append("the package triton")
    found = next(filter(None, map(shutil.which, names)), None)
    headers = sysconfig.get_path("include")
    if found is None:
        lacking.append(f"a compiler ({' or '.join(names)}, or what the variable {variable} names)")
    elif not Path(headers, "Python.h").is_file():
        lacking.append("the headers of Python (python3-dev)")
    elif said := _refusal(found, headers, "c++" if device.type == "cpu" else "c"):
        lacking.append(f"a compiler that works ({found}: {said})")
    if lacking:
        raise BadInput(
            f"compute.compile = {options.compile} needs {' and '.join(lacking)}: install it, or take compute.compile=none"
        )


def _refusal(compiler: str, headers: str, language: str) -> str:
    """What a compiler says of a program that includes Python's headers; empty where it takes it."""
    line = [compiler, "-fsyntax-only", f"-I{headers}", "-x", language, "-"]
    try:
        done = subprocess.run(line, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return next((text for text in done.stderr.splitlines() if "error" in text), f"exit status {done.returncode}")


def wrap(method: Method, options: Options, device: torch.device) -> nn.Module:
    """`distributed.wrap` of a method that computes its steps by the options; names and values stay.

    Raises BadInput where the backbone has no blocks, or norms between ranks cut its CUDA graphs into pieces.
    """
    # Shapes are static, so cuDNN's search for the fastest kernels pays; who asks torch for repeatable ones gets these.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    model = distributed.wrap(
        method, device, static_graph=options.static_graph, compression=options.gradient_compression
    )
    _prepare(method, options)  # last, since norms have been replaced
    return model


def _prepare(method: Method, options: Options) -> None:
    if options.checkpoint_activations:
        for block in blocks(method.backbone):
            block.forward = _given_up(block)  # type: ignore[method-assign]
    if options.compile == "none":
        return
    if options.records_graphs and any(isinstance(part, nn.SyncBatchNorm) for part in method.backbone.modules()):
        raise BadInput(
            f"compute.compile = {options.compile} records CUDA graphs, which would end at every batch norm over several ranks: "
            "take compute.compile=default, one GPU, or a backbone without batch norm"
        )
    for network in _networks(method):
        network.compile(mode=options.compile, dynamic=False)  # in place, so that no name changes
    if options.records_graphs:
        # Outputs of one step may be overwritten from the next on; without it, from a network's next pass on.
        method.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def _networks(method: Method) -> Iterator[nn.Module]:
    """Backbones and heads, those that are trained and those that follow."""
    for part in method.children():
        yield from part.values() if isinstance(part, nn.ModuleDict) else [part]


# ----------------------------------------------------------------------------------------------------------- activations
def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a timm model, as its layer decay numbers them: residual blocks, those of a transformer.

    Raises BadInput where it has none.
    """
    groups = backbone.group_matcher(coarse=False) if hasattr(backbone, "group_matcher") else {}  # type: ignore[operator]
    patterns = []
    for value in groups.values() if isinstance(groups, dict) else ():
        each = [value] if isinstance(value, str) else [one if isinstance(one, str) else one[0] for one in value]
        patterns += [pattern for pattern in each if r"(\d+)" in pattern]
    found = [
        module
        for name, module in backbone.named_modules()
        # A layer by itself has nothing to give up, and may work in place on what it would be computed from again.
        if any(re.fullmatch(pattern, name) for pattern in patterns) and any(module.children())
    ]
    if not found:
        raise BadInput(
            f"compute.checkpoint_activations needs a backbone of blocks and timm knows none in {type(backbone).__name__}: "
            "take compute.checkpoint_activations=false, and optim.accumulate for less memory"
        )
    return found


def _given_up(block: nn.Module) -> Callable[..., Any]:
    """The forward pass of `block` without its activations. Running statistics count it once, which timm's
    set_grad_checkpointing does twice."""
    forward = block.forward

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), copied_buffers(block)

    def own_lists(*inputs: Any, **options: Any) -> Any:
        return forward(*_with_own_lists(inputs), **options)

    @functools.wraps(forward)
    def again(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(own_lists, *_with_own_lists(inputs), use_reentrant=False, context_fn=contexts, **options)

    return again


def _with_own_lists(inputs: tuple[Any, ...]) -> list[Any]:
    """Inputs for a pass of its own: DenseNet's blocks have their list of tensors appended to, HRNet's write into theirs."""
    return [list(x) if isinstance(x, list) else x for x in inputs]


# ---------------------------------------------------------------------------------------------------------- taken back
class Copies:
    """Copies of tensors, and the way back to them by a few kernels for all, whatever their number.

    Args:
        tensors: as they stay, the same objects, for the whole run.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # As whole numbers of their size: a product with 0 or 1 then keeps or drops all bits, NaN's too.
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        self._there: dict[torch.dtype, list[Tensor]] = {}
        for x in tensors:
            kind = kinds[x.element_size()]
            self._there.setdefault(kind, []).append(x.detach().view(kind))
        self._copies = {kind: [torch.empty_like(x) for x in some] for kind, some in self._there.items()}

    def take(self) -> None:
        """Copy the tensors as they are."""
        for kind, there in self._there.items():
            torch._foreach_copy_(self._copies[kind], there)

    def put_back_unless(self, kept: Tensor) -> None:
        """Put back what was taken, bit for bit, where `kept`, a boolean on the device, is false. Ends the copies."""
        for kind, there in self._there.items():
            copies, factor = self._copies[kind], kept.to(kind)
            torch._foreach_mul_(there, factor)
            torch._foreach_mul_(copies, 1 - factor)
            torch._foreach_add_(there, copies)
