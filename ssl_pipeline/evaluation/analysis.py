"""What a representation is like, in numbers and in pictures: `ssl-pipeline analyze`.

Two passes over held-out pictures. One, not augmented, over all of them: neighbours, a projection, and the measures. One
over some of them in two views of the training's augmentation: how far positives are from negatives. Everything that is
drawn from all is drawn by key, so that the same run gives the same numbers again; what the pictures show lies in the
result as plain lists, from which `draw` makes them without a network, or pictures of the data.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, distributed, monitor
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import Index, read_index
from ssl_pipeline.data.listing import FORMATS
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation import features, knn, measures, pictures, spectrum
from ssl_pipeline.evaluation.features import Options as FeatureOptions
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.run_folder import RunFolder
from ssl_pipeline.sparse_head import ACTIVE, Groups, active, group_norms

MEASURED = 10_000
"""Held-out pictures, at most, whose vectors are measured: distances of all pairs are taken."""
POINTS = 2_000
"""Points of the projection, at most."""
NAMED = 20
"""Classes up to which all are told apart in the projection; of more, the COMMONEST."""
COMMONEST = 10
QUERIES, NEIGHBOURS = 8, 8
BINS = (0.01, 0.02, 0.05, 0.1)
"""Widths of the histograms' bins: parts of 1, so that an edge lies at 0."""
THUMBNAIL = 160
"""Longer side in pixels, at most."""


class Options(config.Options):
    """What to look at."""

    features: FeatureOptions
    run: Path | None = None
    """Run folder whose newest good checkpoint gives backbone and head; None: the backbone that `features` names, alone."""
    views: list[ViewSpec] = Field(min_length=1)
    """The training views; the first two are compared, all are shown."""
    pictures: int = Field(1000, ge=2)
    """Held-out pictures that are seen in two views."""
    projection: Literal["pca", "tsne"] = "pca"
    split: Literal["val", "train"] = "val"
    seed: int = 0
    """Of which pictures are drawn, and of their views."""


@dataclass(frozen=True)
class Analysis:
    """What was found."""

    result: dict[str, Any]
    """Numbers, and under `pictures` what the pictures show: plain lists."""
    thumbnails: dict[int, np.ndarray | None]
    """(H, W, 3) uint8 of the neighbours' page, by id; None: unreadable."""
    views: list[np.ndarray]
    """Of each view the first pictures, (N, S, S, 3) uint8."""

    def draw(self, name: str, palette: pictures.Palette = pictures.LIGHT) -> dict[str, bytes]:
        """PNGs by their names; `name` is that of what was looked at. Raises BadInput where matplotlib is missing."""
        of = partial(pictures.source, name, self.result["step"])
        split, held_out = self.result["split"], self.result["pictures_held_out"]
        rows = self.result["pictures"]["neighbours"]
        return {
            **draw(self.result, name, palette),
            "neighbours": pictures.neighbours(rows, self.thumbnails, palette, of(split, held_out)),
            "views": pictures.views(self.views, palette, of(split)),
        }

    def write(self, folder: Path, name: str, ending: str = "") -> list[Path]:
        """Write what `draw` gives, for white paper, as `folder`/<picture><ending>.png. Raises as `spectrum.write_picture`."""
        paths = []
        for picture, data in self.draw(name).items():
            path = folder / f"{picture}{ending}.png"
            spectrum.write_file(path, data)
            paths.append(path)
        return paths


def draw(result: Mapping[str, Any], name: str, palette: pictures.Palette = pictures.LIGHT) -> dict[str, bytes]:
    """PNGs by their names of what analysis.json of `name` holds under `pictures`: those that need no pictures of the data.

    Raises BadInput where matplotlib is missing.
    """
    of = partial(pictures.source, name, result.get("step"))
    split = result.get("split")
    makers: dict[str, Callable[[Any], bytes]] = {
        "spectrum": lambda shown: pictures.spectrum({name: shown}, palette, of(split, shown["r"]["count"])),
        "group_norms": lambda shown: pictures.group_norms(shown, palette, of(None)),
        "cosines": lambda shown: pictures.cosines(shown, palette, of(split, result.get("pictures_in_two_views"))),
        "projection": lambda shown: pictures.projection(shown, palette, of(split, len(shown["points"]))),
    }
    found = result.get("pictures", {})
    return {picture: maker(found[picture]) for picture, maker in makers.items() if found.get(picture)}


def run(options: Options) -> Analysis:
    """Look at a backbone and, where there is one, its head. All ranks must call it; the result is the same on all.

    Raises BadInput where pictures are missing or too many unreadable, where there are fewer than two, where features are
    not finite, and for t-SNE without scikit-learn.
    """
    if options.projection == "tsne":
        _require_sklearn()
    world = distributed.start()
    index = distributed.in_turn(lambda: _index(options))
    network: nn.Module
    head: ProjectionHead | None = None
    step: int | None = None
    if options.run is not None:
        network, head, step = features.trained(RunFolder(options.run))
        head = head.to(world.device)
    else:
        network = distributed.together(lambda: features.network(options.features))
    network = network.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = _drawn(options.seed, 0, len(index))
    whole = _held_out(network, head, index, order[:MEASURED], options, world)
    readable = set(torch.cat(distributed.gather_rows(whole.all.ids)).tolist())
    if len(readable) < 2:
        raise BadInput(f"{str(index.root)!r} has {len(readable)} readable pictures, and two are needed to compare")
    drawn = [sample for sample in _drawn(options.seed, 1, len(index)).tolist() if sample in readable]
    seen = index.select(np.array(drawn[: options.pictures]))
    first, second, views = _two_views(network, head, seen, options, world)
    found = {
        "split": options.split,
        "step": step,
        "pictures_held_out": len(readable),
        "pictures_measured": len(whole.r),
        "pictures_in_two_views": len(first["representation"]),
        **_measured(whole, first, second, world.device),
    }
    shown: dict[str, Any] = {
        "spectrum": whole.spectra,
        "cosines": {space: cosine_histogram(first[space], second[space]) for space in first},
        "projection": _projection(whole.all, index, options),
        "neighbours": _neighbours(whole.all, index, order, readable),
    }
    if head is not None and head.last_layer is not None:
        groups = head.options.sparse.groups
        head_found = measures.head_measures(head.last_layer.weight.detach(), groups)
        found |= {f"head_{name}": value for name, value in head_found.items()}
        layers = {f"head.{name}": layer for name, layer in head.named_modules() if layer in head.sparse_layers}
        shown["group_norms"] = [sorted_norms(layer, groups, name) for name, layer in layers.items()]
    asked = {one["id"] for row in shown["neighbours"] for one in [row, *row["neighbours"]]}
    thumbnails = {sample: thumbnail(index, sample) for sample in sorted(asked)} if world.is_main else {}
    return Analysis({**found, "pictures": shown}, thumbnails, views)


def _index(options: Options) -> Index:
    """The pictures to look at. Raises BadInput."""
    root = options.features.root
    if options.split == "val" and not (root / "val").is_dir() and (root / "train").is_dir():
        raise BadInput(
            f"{str(root)!r} has no val/, so nothing is held out: give --split train, or other pictures by --data FOLDER"
        )
    return read_index(root / options.split)


# ----------------------------------------------------------------------------------------------------------- two passes
@dataclass(frozen=True)
class _HeldOut:
    all: features.Features
    """This rank's share of the representations."""
    r: Tensor
    """Representations (M, D) that are measured, of all ranks."""
    z: Tensor | None
    """Their embeddings (M, K)."""
    spectra: dict[str, dict[str, Any]]
    """Of the layers "r" and "z", of all pictures."""


def _held_out(
    network: nn.Module, head: ProjectionHead | None, index: Index, measured: np.ndarray, options: Options,
    world: distributed.World,
) -> _HeldOut:  # fmt: skip
    """The un-augmented pass; `measured` are the ids whose embeddings are kept."""
    count = len(range(world.rank, len(index), world.size))
    values = distributed.together(lambda: features.room(count, backbones.width(network), options.features.memory))
    labels, ids = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    wanted = torch.zeros(len(index), dtype=torch.bool)
    wanted[torch.from_numpy(measured)] = True
    kept = [torch.empty(0, 0 if head is None else head.outputs)]
    sums = spectrum.covariances(network, head, world.device)
    filled = 0
    for part in features.stream(network, head, index, options.features, world):
        rows = slice(filled, filled + len(part.ids))
        values[rows], labels[rows], ids[rows] = part.r.cpu(), part.labels, part.ids
        for layer, covariance in sums.items():
            covariance.add(getattr(part, layer))
        if part.z is not None:
            kept.append(part.z.cpu()[wanted[part.ids]])
        filled += len(part.ids)
    share = features.Features(values[:filled], labels[:filled], ids[:filled], len(index.classes))
    own = wanted[share.ids]
    r = _in_order(share.values[own], share.ids[own])
    z = None if head is None else _in_order(torch.cat(kept), share.ids[own])
    return _HeldOut(share, r, z, {layer: spectrum.described(of.over_ranks()) for layer, of in sums.items()})


@torch.no_grad()
def _two_views(
    network: nn.Module, head: ProjectionHead | None, index: Index, options: Options, world: distributed.World
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[np.ndarray]]:
    """Of all pictures of `index`: vectors of their first view and of their second one, (N, D) by space, and the first
    pictures' views."""
    asked = options.features
    views = [view for view in options.views for _ in range(view.count)]
    if len(views) == 1:
        views = views * 2
    data = Loader(
        index,
        [view.model_copy(update={"count": 1}) for view in views],
        max(asked.batch_size // world.size, 1) * world.size,
        seed=options.seed,
        world=world,
        threads=asked.threads,
        readers=asked.readers,
        training=False,
    )
    widths = {"representation": backbones.width(network)} | ({} if head is None else {"embedding": head.outputs})
    found: list[dict[str, list[Tensor]]] = [{s: [torch.empty(0, width)] for s, width in widths.items()} for _ in (1, 2)]
    ids = [torch.empty(0, dtype=torch.int64)]
    shown: list[np.ndarray] = []
    for step, batch in enumerate(data):
        wanted = data.ids(0, step)
        itself = torch.from_numpy(batch.ids == wanted)  # false where another stands in for an unreadable one
        if not shown:
            shown = monitor.view_pixels(batch.views, [(view.normalize.mean, view.normalize.std) for view in views])
        for view, kept in zip(batch.views, found, strict=False):
            r = network(view.contiguous(memory_format=torch.channels_last)).float()
            kept["representation"].append(r.cpu()[itself])
            if head is not None:
                kept["embedding"].append(head(r).float().cpu()[itself])
        ids.append(torch.from_numpy(wanted)[itself])
    data.close()
    order = torch.cat(ids)
    first, second = ({space: _in_order(torch.cat(parts), order) for space, parts in kept.items()} for kept in found)
    return first, second, shown


def _in_order(rows: Tensor, ids: Tensor) -> Tensor:
    """Rows of all ranks, in the order of their ids, on every rank. All ranks must call it."""
    order = torch.cat(distributed.gather_rows(ids)).argsort()
    return torch.cat(distributed.gather_rows(rows))[order]


def _drawn(seed: int, what: int, count: int) -> np.ndarray:
    """An order of ids that is this seed's."""
    return generator(seed, Purpose.SUBSET, 0, 1 + what).permutation(count)


# --------------------------------------------------------------------------------------------------- numbers and lists
def _measured(
    whole: _HeldOut, first: Mapping[str, Tensor], second: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    """All measures, those of two views and, in place of their other ones, those of what is not augmented."""
    for values in (whole.r, whole.z, *first.values(), *second.values()):
        if values is not None and not bool(values.isfinite().all()):
            raise BadInput(knn.NOT_FINITE)
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    pairs = {space: torch.stack([first[space], second[space]], dim=1).to(device) for space in first}
    found = measures.measure(pairs["representation"], pairs.get("embedding"))
    found |= measures.measure(whole.r.to(device), None if whole.z is None else whole.z.to(device))
    return {name: _rounded(value) for name, value in found.items()}


def cosine_histogram(z1: Tensor, z2: Tensor, rows: int = 1024) -> dict[str, Any]:
    """Of two views (N, D) of N pictures: counts in bins from -1 to 1 of the cosines of the N positive pairs (z1_i, z2_i)
    and of the N (N - 1) negative ones (z1_i, z2_j), and the means of both. The positive pairs, which are fewer, give the
    width of the bins."""
    u, v = (F.normalize(z.double(), dim=1) for z in (z1, z2))
    positive = (u * v).sum(dim=1).clamp(-1, 1)
    edges = bins(positive.numpy())
    negative, total = np.zeros(len(edges) - 1, dtype=np.int64), 0.0
    for start in range(0, len(u), rows):
        each = (u[start : start + rows] @ v.T).clamp(-1, 1)
        others = torch.ones_like(each, dtype=torch.bool)
        others.diagonal(start).fill_(False)
        values = each[others].numpy()
        negative += np.histogram(values, edges)[0]
        total += float(values.sum())
    return {
        "edges": [_rounded(edge) for edge in edges],
        "positive": np.histogram(positive.numpy(), edges)[0].tolist(),
        "negative": negative.tolist(),
        "positive_mean": _rounded(float(positive.mean())),
        "negative_mean": _rounded(total / max(len(u) * (len(u) - 1), 1)),
    }


def bins(values: np.ndarray) -> np.ndarray:
    """Edges from -1 to 1 for a histogram of values (N,): the narrowest of BINS that is no narrower than 2 IQR / N^(1/3).

    Source: Freedman and Diaconis 1981, "On the histogram as a density estimator".
    """
    low, high = np.percentile(values, [25, 75]) if len(values) else (0.0, 0.0)
    least = 2 * (high - low) / max(len(values), 1) ** (1 / 3)
    width = next((width for width in BINS if width >= least), BINS[-1])
    return np.linspace(-1, 1, round(2 / width) + 1)


def sorted_norms(layer: nn.Linear, groups: Groups, name: str) -> dict[str, Any]:
    """Norms of a layer's groups, the largest first, and which of them are active."""
    norms = group_norms(layer.weight.detach().double().cpu(), groups)
    return {
        "name": name,
        "groups": groups,
        "norms": [_rounded(norm) for norm in norms.sort(descending=True).values.tolist()],
        "threshold": _rounded(ACTIVE * float(norms.max())),
        "active": int(active(norms).sum()),
    }


def _neighbours(whole: features.Features, index: Index, order: np.ndarray, readable: set[int]) -> list[dict[str, Any]]:
    """The first QUERIES readable pictures of `order`, each with those nearest to it by cosine, itself left out.

    At the same cosine the smaller id comes first.
    """
    queries = [sample for sample in order.tolist() if sample in readable][:QUERIES]
    k = min(NEIGHBOURS, len(readable) - 1)
    near = knn.nearest(_rows(whole, queries), whole, k + 1, cosine=True)
    rows = []
    for query, distances, ids in zip(queries, near.distances.tolist(), near.ids.tolist(), strict=True):
        others = [(sample, 1 - d / 2) for sample, d in zip(ids, distances, strict=True) if sample != query][:k]
        found = [{**_named(index, sample), "cosine": _rounded(cosine)} for sample, cosine in others]
        rows.append({**_named(index, query), "neighbours": found})
    return rows


def _named(index: Index, sample: int) -> dict[str, Any]:
    label = int(index.labels[sample])
    return {"id": sample, "path": index.paths[sample], "class": index.classes[label] if label >= 0 else None}


def _rows(whole: features.Features, samples: Sequence[int]) -> Tensor:
    """Representations of these ids, in this order, on every rank. All ranks must call it."""
    wanted = torch.tensor(samples)
    own = torch.isin(whole.ids, wanted)
    ids, values = (torch.cat(distributed.gather_rows(x[own])) for x in (whole.ids, whole.values))
    place = {sample: row for row, sample in enumerate(ids.tolist())}
    return values[[place[sample] for sample in samples]]


def _projection(whole: features.Features, index: Index, options: Options) -> dict[str, Any]:
    ids = torch.cat(distributed.gather_rows(whole.ids)).sort().values.numpy()
    labels = index.labels[ids]
    names, chosen = points(labels, index.classes, options.seed)
    values = _rows(whole, ids[chosen].tolist())
    if options.projection == "tsne":
        placed, axes = tsne(values, options.seed), ["first t-SNE dimension, no unit", "second t-SNE dimension, no unit"]
    else:
        placed, shares = pca(values)
        axes = [f"{which} principal component ({100 * share:.0f} % of the variance)"
                for which, share in zip(("first", "second"), shares, strict=True)]  # fmt: skip
    place = {index.classes.index(name): number for number, name in enumerate(names)}
    return {
        "axes": axes,
        "points": [[_rounded(x, 5) for x in row] for row in placed.tolist()],
        "labels": [place.get(label, -1) for label in labels[chosen].tolist()],
        "classes": names,
    }


def points(labels: np.ndarray, classes: Sequence[str], seed: int, most: int = POINTS) -> tuple[list[str], np.ndarray]:
    """Which classes are told apart, and places, ascending, of `most` pictures to be shown, of labels (N,).

    Where there are more than NAMED classes, these are the COMMONEST, and half of the places are theirs: of 1,000 classes
    an even draw would show two pictures each.
    """
    order = _drawn(seed, 2, len(labels))
    counts = Counter(labels[labels >= 0].tolist())
    told = sorted(counts)
    if len(told) > NAMED:
        told = sorted(sorted(counts, key=lambda label: (-counts[label], label))[:COMMONEST])
        rank = {label: iter(range(len(labels))) for label in told}  # counts each class's pictures as they come
        each = most // 2 // COMMONEST
        first = np.array([label in rank and next(rank[label]) < each for label in labels[order].tolist()])
        order = np.concatenate([order[first], order[~first]])
    return [classes[label] for label in told], np.sort(order[:most])


def pca(x: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Scores (N, 2) on the first two principal components of x (N, D), and their shares of the variance.

    The sign of a component is that for which its largest score in size is positive.
    """
    centred = x.double() - x.double().mean(dim=0)
    if len(x) < x.shape[1]:
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        scores = vectors.flip(1)[:, :2] * values.flip(0)[:2].clamp(min=0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        scores = centred @ vectors.flip(1)[:, :2]
    scores = F.pad(scores, (0, 2 - scores.shape[1]))
    largest = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))
    scores = scores * torch.where(largest < 0, -1.0, 1.0)
    shares = F.pad(values.flip(0)[:2].clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-300), (0, 2))
    return scores.numpy(), (float(shares[0]), float(shares[1]))


def tsne(x: Tensor, seed: int) -> np.ndarray:
    """scikit-learn's t-SNE of x (N, D), begun at the principal components: (N, 2). Raises BadInput without scikit-learn."""
    manifold = _require_sklearn()
    perplexity = min(30.0, (len(x) - 1) / 3)
    return manifold.TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x.numpy())


def _require_sklearn() -> Any:
    try:
        from sklearn import manifold
    except ImportError:
        raise BadInput("t-SNE needs scikit-learn: pip install 'ssl-pipeline[demo]', or take --projection pca") from None
    return manifold


def thumbnail(index: Index, sample: int) -> np.ndarray | None:
    """A small picture of a sample, (H, W, 3) uint8; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(index.read(sample).tobytes()), formats=FORMATS) as picture:
            picture.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))  # of a large JPEG not all is decoded
            small = picture.convert("RGB")
    except Exception:  # PIL raises many types on damaged files; all mean the same here
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)


def _rounded(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")
