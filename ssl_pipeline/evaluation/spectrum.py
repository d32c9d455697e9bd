"""Eigenvalue spectra of the covariances of representations r and embeddings z: the paper's Figures 1 and 3.

Source: Song et al. 2023 (arXiv 2307.08913), sections 4 and 7.2. Of the pictures of a split as they are, without
augmentation; the covariance is summed up in float64 batch by batch, so what is held is D x D, whatever the number of
pictures.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, distributed
from ssl_pipeline.data.index import Index, read_index
from ssl_pipeline.evaluation import features, measures, pictures
from ssl_pipeline.evaluation.features import Options as FeatureOptions
from ssl_pipeline.evaluation.knn import NOT_FINITE
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.run_folder import RunFolder, refused

LAYERS = ("r", "z")
"""Representation and embedding, as the paper names them."""


class Options(config.Options):
    """Whose spectra of which pictures."""

    features: FeatureOptions
    run: Path | None
    """Run folder whose newest good checkpoint gives backbone and head; None: the backbone that `features` names, and r."""
    split: str = "val"
    """Folder below the data set's root; its pictures need no labels."""


def run(options: Options) -> dict[str, Any]:
    """The `split`, the `step` of the checkpoint (None without one) and `spectra`. All ranks must call it.

    Raises BadInput where a run has no checkpoint, and for features that are not finite.
    """
    world = distributed.start()
    index = distributed.in_turn(lambda: read_index(options.features.root / options.split))
    backbone: nn.Module
    head: ProjectionHead | None
    step: int | None
    if options.run is not None:
        backbone, head, step = features.trained(RunFolder(options.run))
    else:
        backbone, head, step = distributed.together(lambda: features.network(options.features)), None, None
    return {"split": options.split, "step": step, **spectra(backbone, head, index, options.features, world)}


def spectra(
    backbone: nn.Module, head: ProjectionHead | None, index: Index, options: FeatureOptions, world: distributed.World
) -> dict[str, dict[str, Any]]:
    """Of the layers r and, where there is a head, z: `count` of pictures, `dimensions` D, the four numbers of
    `measures.ranks`, and `eigenvalues`, D of them, descending.

    Networks in evaluation mode; they are moved to the rank's device. All ranks must call it.
    """
    backbone = backbone.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if head is not None:
        head = head.to(world.device)
    sums = covariances(backbone, head, world.device)
    for part in features.stream(backbone, head, index, options, world):
        for layer, covariance in sums.items():
            covariance.add(getattr(part, layer))
    return {layer: described(covariance.over_ranks()) for layer, covariance in sums.items()}


def covariances(
    backbone: nn.Module, head: ProjectionHead | None, device: torch.device
) -> dict[str, measures.Covariance]:
    """Sums of no pictures yet, of the layers r and, where there is a head, z."""
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    sums = {"r": measures.Covariance(backbones.width(backbone), device)}
    return sums if head is None else {**sums, "z": measures.Covariance(head.outputs, device)}


def described(covariance: measures.Covariance) -> dict[str, Any]:
    """What `spectra` says of a layer. Raises BadInput for features that are not finite."""
    matrix = covariance.matrix()
    if not matrix.isfinite().all():
        raise BadInput(NOT_FINITE)
    values = measures.eigenvalues(matrix)
    found = {"count": covariance.count, "dimensions": len(values)}
    return {**found, **measures.ranks(values), "eigenvalues": values.tolist()}


def told(result: Mapping[str, Any]) -> Iterator[str]:
    """A line a layer, to be printed."""
    for layer in LAYERS:
        if layer in result:
            of = result[layer]
            yield (
                f"{layer}: of {of['dimensions']} eigenvalues {of['rank']} above lambda_max * {of['dimensions']} * eps(float32), "
                f"{of['rank_1e-6']} above 1e-6, {of['rank_1e-4']} above 1e-4, {of['rank_1e-2']} above 1e-2 of lambda_max; "
                f"{of['count']} pictures" + (f", which fill {of['count'] - 1} dimensions at most" if _few(of) else "")
            )


def _few(of: Mapping[str, Any]) -> bool:
    return of["count"] <= of["dimensions"]


# ------------------------------------------------------------------------------------------------------------- its files
def write_table(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """CSV of the spectra of one run or several, by name: layer, index from 1, eigenvalue, log10; several have `run` before.

    log10 of an eigenvalue that is 0 is -inf. Raises as `write_file`.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    several = len(results) > 1
    lines.writerow([*(["run"] if several else []), "layer", "index", "eigenvalue", "log10"])
    for name, result in results.items():
        for layer in LAYERS:
            for number, value in enumerate(result.get(layer, {}).get("eigenvalues", []), start=1):
                lines.writerow([*([name] if several else []), layer, number, value, log10(value)])
    write_file(path, text.getvalue().encode())


def write_picture(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """PNG of the spectra of runs by name. Raises BadInput where matplotlib is missing, and as `write_file`."""
    of = [pictures.source(name, r["step"], r["split"], r["r"]["count"]) for name, r in results.items()]
    layers = {name: {k: r[k] for k in LAYERS if k in r} for name, r in results.items()}
    write_file(path, pictures.spectrum(layers, source="; ".join(of)))


def log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def write_file(path: Path, data: bytes) -> None:
    """Whole or not at all. Raises as `run_folder.refused`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # never through a link that another one put there
            file.write(data)
        os.replace(partial, path)
    except OSError as error:
        raise refused(path, error) from None
