"""The whole way in minutes, on real pictures: scikit-learn's handwritten digits, a small ResNet, two CPU cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ssl_pipeline import config
from ssl_pipeline.data.prepare import prepare
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation import analysis, features, knn, linear, report
from ssl_pipeline.exits import Status
from ssl_pipeline.pretrain import PretrainConfig, completed, pretrain
from ssl_pipeline.run_folder import RunFolder

DRAWS = 5
"""Draws of labelled examples over which the few-label probes are averaged."""


def demo(method: str, output: Path, data: Path) -> Status:
    """Pretrain `method` + SparseHead on the digits, measure it beside its random initialisation, write a report."""
    if not data.is_dir():
        prepare("digits", data)
    tree = config.load(f"digits/{method}_sparsehead", [f"data.root={data}"])
    options = config.validate(PretrainConfig, tree.values, tree)
    status = pretrain(options, output)
    if status != Status.DONE:
        return status
    run = RunFolder(output)
    summary = {
        "random_init": _measure(features.options(output, random_init=True)),
        "pretrained": _measure(features.options(output)),
    }
    path = run.write_result("summary", summary)
    asked = analysis.Options(features=features.options(output), run=output, views=options.data.views)
    found = analysis.run(asked)
    run.write_result("analysis", found.result)
    found.write(run.results, output.resolve().name)
    note = (
        "A frozen backbone on 360 held-out handwritten digits (scikit-learn). Few-label columns are means over "
        f"{DRAWS} draws of the labelled examples. One seed."
    )
    page, *_ = report.write([run], title=f"{method} + SparseHead on handwritten digits", note=note, complete=completed)
    for name, values in summary.items():
        print(f"{name}: " + "  ".join(f"{key} {value:.1f}" for key, value in values.items()))
    print(
        f"report: {page}   numbers: {path}   backbone: {run.backbone}   curves: tensorboard --logdir {run.tensorboard}"
    )
    return Status.DONE


def _measure(source: features.Options) -> dict[str, float]:
    train, test = features.extract_each(source)
    probe = linear.Recipe()
    result = {
        "knn5": knn.evaluate(train, test)["knn5_top1"],
        "linear": linear.evaluate(probe, train, test)["linear_top1"],
    }
    for count in (1, 10):
        scores = []
        for draw in range(DRAWS):
            order = generator(draw, Purpose.PROBE, 0).permutation(len(train.labels))
            chosen = torch.cat([torch.tensor([i for i in order if train.labels[i] == label][:count])
                                for label in train.labels.unique()])  # fmt: skip
            scores.append(linear.evaluate(probe, train.select(chosen), test)["linear_top1"])
        result[f"linear_{count}_per_class"] = float(np.mean(scores))
    return result
