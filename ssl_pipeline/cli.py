"""`ssl-pipeline VERB`. What a verb needs is imported when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ssl_pipeline import __version__, preemption
from ssl_pipeline.exits import BadInput, Status, Stop, printable

if TYPE_CHECKING:
    from ssl_pipeline.run_folder import RunFolder

Verb = Callable[[argparse.Namespace], int]

RESUMED = (
    "pretrain",
    "linear-probe",
    "semi-supervised",
    "train-detectron2",
)  # as in launch, which --help does not wait for


# --------------------------------------------------------------------------------------------------------------- verbs
def pretrain(args: argparse.Namespace) -> int:
    """pretrain a backbone, or go on with a run that was stopped"""
    from ssl_pipeline import config

    tree = config.load(args.config, args.overrides)
    from ssl_pipeline.pretrain import PretrainConfig, pretrain  # takes seconds, for which no wrong name waits

    return pretrain(config.validate(PretrainConfig, tree.values, tree), args.output)


def show_config(args: argparse.Namespace) -> int:
    """print a resolved config and what follows from it; runs nothing"""
    from ssl_pipeline import config

    if args.config is None:
        print("\n".join(config.packaged_names()))
        return Status.DONE
    if args.ranks < 1:
        raise BadInput(f"--ranks {args.ranks} is no number of processes: give 1 or more")
    tree = config.load(args.config, args.overrides)
    from ssl_pipeline.pretrain import PretrainConfig, consequences  # seconds that no listing waits for

    options = config.validate(PretrainConfig, tree.values, tree)
    values = options.model_dump(mode="json")
    if args.explain:
        for key, value in config.flatten(values).items():
            print(f"{key} = {json.dumps(value)}    # {tree.origin(key)}")
    else:
        print(config.dump_yaml(values), end="")
    print("\n# What follows from it")
    for name, value in consequences(options, args.ranks).items():
        print(f"# {name}: {value}")
    return Status.DONE


@dataclass(frozen=True)
class _Evaluation:
    """What an evaluation verb's command line comes to."""

    features: Any
    """evaluation.features.Options"""
    into: RunFolder | None
    """Whose results/ it writes to; None: it only prints."""
    name: str
    """Of its result's file."""
    recipe: Any = None
    protocol: str = ""
    preset: str = ""
    semi_supervised: Any = None
    """evaluation.semi_supervised.Options"""
    analysis: Any = None
    """evaluation.analysis.Options"""


def _evaluation(args: argparse.Namespace) -> _Evaluation:
    """All that can be checked of an evaluation before it runs has been. Raises BadInput."""
    from ssl_pipeline import config
    from ssl_pipeline.evaluation import analysis, features, linear, logistic, probe, semi_supervised

    run = _run_of(args.source)
    own = [text.removeprefix("recipe.") for text in args.overrides if text.startswith("recipe.")]
    rest = [text for text in args.overrides if not text.startswith("recipe.")]
    for text in rest:
        if not text.startswith(("data.", "backbone.", "seed=")):
            raise BadInput(
                f"{text.partition('=')[0]!r} does not change an evaluation: give data.*, backbone.* or seed of the run, or "
                "recipe.* of the evaluation, as in recipe.epochs=50"
            )
        if text.startswith("seed=") and not args.random_init:
            raise BadInput("seed belongs to --random-init; an evaluation's own is recipe.seed")
    tree = None
    if args.config is not None and args.source.is_dir():
        raise BadInput(f"{args.source} is a run and has its own config: leave --config out, or change it by data.*")
    if args.config is not None:
        tree = config.load(args.config, rest)
    elif run is not None:
        tree = config.Tree()
        tree.merge(run.read_config(), str(run.config))
        config.apply_overrides(tree, rest)
    source = features.options(args.source, tree.values if tree else None, args.random_init)
    values: Any = tree.values if tree else {}
    source = _other_data(args, source, (args.split,) if args.verb == "analyze" else ("train", "val"))
    into = _into(args.source, args.output, run)
    verb = args.verb.replace("-", "_")
    end = _end(args.source, args.random_init)
    trained_on = run.read_config().get("data", {}).get("name") if run is not None else source.name
    end += f"@{source.name}".replace("/", "_") if args.data is not None or source.name != trained_on else ""
    if args.verb == "knn":
        if own:
            raise BadInput(f"knn has no recipe.{own[0]}: it takes --k and --temperature")
        return _Evaluation(source, into, verb + (f"_k{args.k}" if args.k != 5 else "") + end)
    if args.verb == "analyze":
        if own:
            raise BadInput(f"analyze has no recipe.{own[0]}: it takes --pictures, --projection and --split")
        made = {
            "features": source,
            "run": args.source if args.source.is_dir() and not args.random_init else None,
            "views": values.get("data", {}).get("views"),
            **{key: getattr(args, key) for key in ("pictures", "projection", "split")},
        }
        name = "analysis" + (f"_{args.split}" if args.split != "val" else "") + end
        return _Evaluation(source, into, name, analysis=config.validate(analysis.Options, made))

    def recipe(model, folder, preset):  # type: ignore[no-untyped-def]
        tree = config.Tree()
        if preset:
            known = config.presets(folder)
            if not Path(preset).is_file() and preset not in known:
                raise BadInput(f"no preset {preset!r} of {args.verb}: neither a file nor one of {', '.join(known)}")
            tree = config.load(preset if Path(preset).is_file() else f"{folder}/{preset}")
        config.apply_overrides(tree, own)
        return config.validate(model, tree.values, tree, prefix="recipe.")

    if args.verb == "linear-probe":
        usual = "logistic" if args.data is not None else values.get("data", {}).get("protocol", "small")
        protocol = args.protocol or usual
        verb += f"_{protocol}" if protocol != usual else ""
        if protocol != "imagenet":
            if args.preset:
                raise BadInput(f"--preset is for the protocol imagenet, and this is {protocol}: leave it out")
            made = recipe({"small": linear.Recipe, "logistic": logistic.Recipe}[protocol], None, None)
            return _Evaluation(source, into, verb + end, made, protocol)
        folder = "_evaluation/linear_probe"
        method = values.get("method", {}).get("name")
        preset = args.preset or (method if method in config.presets(folder) else "barlow_twins")
        found = _Evaluation(source, into, verb + end, recipe(probe.Recipe, folder, preset), protocol, preset)
    else:
        folder = "_evaluation/semi_supervised"
        preset = args.preset or "barlow_twins"
        if f"{preset}_{args.percent:g}percent" in config.presets(folder):
            preset = f"{preset}_{args.percent:g}percent"
        made = recipe(semi_supervised.Recipe, folder, preset)
        options = config.validate(
            semi_supervised.Options,
            {"features": source, "percent": args.percent, "list_path": args.list, "sweep": args.sweep},
        )
        if options.list_path is None:
            semi_supervised.known_list(source.name, args.percent)
        if (made.backbone_rates or made.head_rates) and not args.sweep:
            raise BadInput(
                "recipe.backbone_rates and recipe.head_rates are a sweep's: give --sweep, or recipe.backbone_rate"
            )
        listed = f"_{args.list.stem}" if args.list and args.list.name not in semi_supervised.names() else ""
        name = f"semi_supervised_{args.percent:g}percent{listed}{'_sweep' if args.sweep else ''}{end}"
        found = _Evaluation(source, into, name, made, "fine-tuning", preset, options)
    if into is None:
        raise _nowhere(args)
    return found


def _other_data(args: argparse.Namespace, source: Any, needed: Sequence[str]) -> Any:
    """The features.Options `source`, of the pictures of --data where it is given. Raises BadInput."""
    if args.data is None:
        return source
    lacking = [split for split in needed if not (args.data / split).is_dir()]
    if lacking:
        raise BadInput(
            f"--data {str(args.data)!r} has no folder {' and no '.join(lacking)}: give one laid out as train/<class>/ and "
            "val/<class>/, or with tar shards in both"
        )
    return source.model_copy(update={"root": args.data, "name": args.data.absolute().name})


def _into(source: Path, output: Path | None, run: RunFolder | None) -> RunFolder | None:
    """Whose results/ an evaluation writes to. Raises BadInput where it is another user's, --output another source's, or
    nothing can be written there."""
    from ssl_pipeline.run_folder import RunFolder, require_writable

    into = RunFolder(output) if output else run
    if into is not None:
        into.require_own()
        require_writable(into.results)
    if output is not None and into is not None and into.config.is_file():
        owner = into.read_config().get("method", {}).get("name")
        if owner != str(source) and (run is None or into.path.resolve() != run.path.resolve()):
            raise BadInput(f"--output {str(output)!r} holds results of {owner!r}: name another folder for {source}")
    return into


def _nowhere(args: argparse.Namespace) -> BadInput:
    if not args.source.exists() and not str(args.source).startswith(("timm:", "torchvision:")):
        return BadInput(f"{str(args.source)!r} is neither a run folder nor a file of weights")
    return BadInput(f"{args.source} is no run: give --output FOLDER for the state and the results of {args.verb}")


def _end(source: Path, random_init: bool = False) -> str:
    """What a result's name says of its source."""
    return ("_random_init" if random_init else "") + (f"_{source.stem}" if source.is_file() else "")


def _run_of(source: Path) -> RunFolder | None:
    """The run that a folder is, or that a bare backbone RUN/backbones/epoch_0100.pth belongs to; None for other files."""
    from ssl_pipeline.run_folder import RunFolder

    if source.is_dir():
        return RunFolder(source)
    whole = RunFolder(source.absolute().parent)
    if source.absolute() == whole.backbone and whole.config.is_file():
        return whole
    run = RunFolder(source.absolute().parent.parent)
    return run if source.absolute().parent == run.backbones and run.config.is_file() else None


def _begin(args: argparse.Namespace) -> _Evaluation:
    """Join the other ranks, of which only the main one is heard, and see what is asked."""
    from ssl_pipeline import distributed

    if not distributed.start().is_main:
        logging.getLogger("ssl_pipeline").setLevel(logging.WARNING)
    return distributed.together(lambda: _evaluation(args))


def _tell(args: argparse.Namespace, asked: _Evaluation, result: dict[str, Any]) -> int:
    """Print a result of an evaluation on pictures and write it into RUN/results, on the main rank."""
    features = asked.features
    data = {"name": features.name, "root": str(features.root)}
    described = {"backbone": features.backbone.model_dump(mode="json"), "data": data}
    measured: dict[str, Any] = {
        "weights": features.weights,
        "data_root": str(features.root),
        "data_name": features.name,
        **({"recipe": asked.recipe.model_dump(mode="json")} if asked.recipe is not None else {}),
    }
    return _record(args, asked.into, asked.name, result, measured, described)


def _record(
    args: argparse.Namespace,
    into: RunFolder | None,
    name: str,
    result: dict[str, Any],
    measured: dict[str, Any],
    described: dict[str, Any],
    unchanging: tuple[str, ...] = ("data.root", "data.threads", "data.readers"),
) -> int:
    """Print a result and write it into results/, on the main rank.

    `described` is of a source that is no run of ours; overrides of `unchanging` keys are not told as changes.
    """
    from ssl_pipeline import distributed

    if distributed.rank() != 0:
        return Status.DONE
    for key, value in result.items():
        if isinstance(value, dict) and all(isinstance(one, float) for one in value.values()):
            print(f"{key}: " + ", ".join(f"{name} {one:.2f}" for name, one in value.items()))
        elif isinstance(value, (int, float, str)):
            plain = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{key}: {value:.2f} %" if key.endswith(("_top1", "_top5")) else f"{key}: {plain}")
    if into is None:
        print("written nowhere: give --output FOLDER")
        return Status.DONE
    if not into.config.is_file():
        into.describe({"method": {"name": str(args.source)}, **described})
    changed = [text.removeprefix("recipe.") for text in args.overrides if text.partition("=")[0] not in unchanging]
    result = {"ranks": distributed.world_size(), **result, **measured, "changed": changed}  # of a finished one, its own
    before = into.read_results().get(name)
    print(f"written to {into.write_result(name, result)}")
    if before not in (None, result):
        print(f"the result that stood there is kept in {into.results / 'superseded.jsonl'}")
    return Status.DONE


def knn(args: argparse.Namespace) -> int:
    """k-nearest-neighbour accuracy of a frozen backbone"""
    from ssl_pipeline import config
    from ssl_pipeline.evaluation import knn

    asked = _begin(args)
    options = config.validate(knn.Options, {"features": asked.features, "k": args.k, "temperature": args.temperature})
    return _tell(args, asked, knn.run(options))


def linear_probe(args: argparse.Namespace) -> int:
    """accuracy of a linear classifier on a frozen backbone, by the protocol of the data set"""
    from ssl_pipeline.evaluation import features, linear, logistic, probe

    asked = _begin(args)
    if asked.protocol == "imagenet":
        assert asked.into is not None
        return _tell(args, asked, probe.run(asked.features, asked.recipe, asked.preset, asked.into.path))
    if args.signals:
        preemption.stop_at_signals()  # nothing to save: it starts anew
    train, test = features.extract_each(asked.features)
    evaluate = linear.evaluate if asked.protocol == "small" else logistic.evaluate
    return _tell(args, asked, {**evaluate(asked.recipe, train, test), "protocol": asked.protocol})


def semi_supervised(args: argparse.Namespace) -> int:
    """accuracy after fine-tuning on 1 % or 10 % of the labels"""
    from ssl_pipeline import distributed
    from ssl_pipeline.evaluation import semi_supervised

    asked = _begin(args)
    assert asked.into is not None
    result, names = semi_supervised.run(asked.semi_supervised, asked.recipe, asked.preset, asked.into.path)
    if distributed.rank() == 0:
        listing = asked.into.results / f"{asked.name}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        result["labelled_list"] = str(listing)
    return _tell(args, asked, result)


def spectrum(args: argparse.Namespace) -> int:
    """eigenvalue spectra of representations and embeddings, a curve a run and layer: the paper's figures 1 and 3"""
    from ssl_pipeline import distributed
    from ssl_pipeline.evaluation import spectrum
    from ssl_pipeline.run_folder import RunFolder, checkpoint_file

    if not distributed.start().is_main:
        logging.getLogger("ssl_pipeline").setLevel(logging.WARNING)
    asked = distributed.together(lambda: _spectra(args))
    results: dict[str, dict[str, Any]] = {}
    for name, (options, into, file) in asked.items():
        result = results[name] = spectrum.run(options)
        if distributed.rank() == 0:
            print("\n".join([*([f"{name}:"] if len(asked) > 1 else []), *spectrum.told(result)]))
        if into is not None:
            seen = options.features
            if options.run is not None:
                newest = checkpoint_file(RunFolder(options.run).checkpoints, result["step"])
                seen = seen.model_copy(update={"weights": str(newest)})
            _tell(args, _Evaluation(seen, into, file), result)
            if distributed.rank() == 0:
                spectrum.write_table({name: result}, into.results / f"{file}.csv")
    if distributed.rank() == 0:
        _, into, file = next(iter(asked.values()))
        alone = len(asked) == 1
        folder = into.results if alone and into is not None else args.output or Path()
        plain = file if alone else _spectrum_name(args)
        if not alone and args.output is not None:
            spectrum.write_file(folder / f"{plain}.json", (json.dumps(results, indent=2) + "\n").encode())
            print(f"written to {folder / plain}.json")
        spectrum.write_table(results, folder / f"{plain}.csv")
        spectrum.write_picture(results, folder / f"{plain}.png")
        print(f"written to {folder / plain}.png and .csv")
    return Status.DONE


def _spectra(args: argparse.Namespace) -> dict[str, tuple[Any, RunFolder | None, str]]:
    """Of each source, by the name of its curves: (evaluation.spectrum.Options, whose results/, name of the result).

    All that can be checked before any of them is measured has been. Raises BadInput.
    """
    from ssl_pipeline import config
    from ssl_pipeline.evaluation import features, spectrum
    from ssl_pipeline.run_folder import require_writable

    words = [*args.sources, *args.overrides]
    args.overrides = [text for text in words if re.match(r"data\.[\w.]+=", text)]
    sources = [Path(text) for text in words if text not in args.overrides]
    if Path(args.split).name != args.split:
        raise BadInput(f"--split {args.split!r} is no name of a folder below data.root: give val or train, say")
    names = [source.resolve().name for source in sources]
    names = [name if names.count(name) == 1 else str(source) for name, source in zip(names, sources, strict=True)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadInput(f"{twice[0]!r} is given twice: name each run once")
    asked: dict[str, tuple[Any, RunFolder | None, str]] = {}
    for name, source in zip(names, sources, strict=True):
        run = _run_of(source)
        tree = None
        if run is not None:
            run.require_own()
            tree = config.Tree()
            tree.merge(run.read_config(), str(run.config))
            config.apply_overrides(tree, args.overrides)
        elif args.config is not None:
            tree = config.load(args.config, args.overrides)
        seen = _other_data(args, features.options(source, tree.values if tree else None), (args.split,))
        run_folder = source if source.is_dir() else None
        options = config.validate(spectrum.Options, {"features": seen, "run": run_folder, "split": args.split})
        into = None if len(sources) > 1 and args.output is not None else _into(source, args.output, run)
        asked[name] = (options, into, _spectrum_name(args, source))
    if len(sources) > 1 or into is None:
        require_writable(args.output or Path())
    args.source = sources[0]  # for `_record`, which describes it where it is alone and no run
    return asked


def _spectrum_name(args: argparse.Namespace, source: Path | None = None) -> str:
    """Of the files of one source, or of all together."""
    name = "spectrum" + (f"_{args.split}" if args.split != "val" else "") + (_end(source) if source is not None else "")
    return name + (f"@{args.data.absolute().name}" if args.data is not None else "")


def analyze(args: argparse.Namespace) -> int:
    """numbers and pictures of a representation and its head: spectra, cosines, group norms, neighbours, a projection"""
    from ssl_pipeline import distributed
    from ssl_pipeline.evaluation import analysis, pictures
    from ssl_pipeline.run_folder import RunFolder, checkpoint_file

    asked = _begin(args)
    pictures.require_matplotlib()
    found = analysis.run(asked.analysis)
    if asked.analysis.run is not None:
        weights = checkpoint_file(RunFolder(asked.analysis.run).checkpoints, found.result["step"])
        asked = replace(asked, features=asked.features.model_copy(update={"weights": str(weights)}))
    elif distributed.rank() == 0:
        print("no head: the representation alone")
    _tell(args, asked, found.result)
    if asked.into is not None and distributed.rank() == 0:
        for path in found.write(asked.into.results, args.source.resolve().name, asked.name.removeprefix("analysis")):
            print(f"written to {path}")
    return Status.DONE


def _weights(args: argparse.Namespace) -> Any:
    """The backbone that is to go out: export.Source."""
    from ssl_pipeline import config, export

    if args.config is not None and args.source.is_dir():
        raise BadInput(f"{args.source} is a run and has its own config: leave --config out")
    run = _run_of(args.source)
    values = config.load(args.config).values if args.config is not None else run.read_config() if run else None
    return export.source(args.source, values, getattr(args, "random_init", False))


def convert_to_detectron2(args: argparse.Namespace) -> int:
    """write a backbone as Detectron2 reads it (.pkl), checked tensor by tensor and by its features"""
    from ssl_pipeline import export
    from ssl_pipeline.evaluation import detection

    source = _weights(args)
    author = f"ssl_pipeline {__version__}, from {source.name}"
    done = export.to_detectron2(source.backbone, source.options, args.out, author, detection.stages())
    norms = done.tensors // 5
    print(f"source: {source.name} ({source.options.name})")
    print(f"tensors: {done.tensors}, of {norms} convolutions and their batch norms; counters left out: {done.left_out}")
    print(
        f"largest difference of res2 to res5, read back and rebuilt: {done.difference:.1e} (limit {export.TOLERANCE:g})"
    )
    if done.by_detectron2 is None:
        print("largest difference by Detectron2 itself: not measured, it is not installed here")
    else:
        print(f"largest difference by Detectron2 itself: {done.by_detectron2:.1e} (limit {export.TOLERANCE:g})")
    print("Detectron2 must be told, as configs/detectron2 does:")
    for key, value in {**source.pixels, **done.resnet.settings}.items():
        print(f"  {key} {value}")
    print(f"written to {args.out}")
    return Status.DONE


def export(args: argparse.Namespace) -> int:
    """write a backbone by torchvision's or timm's names, or as safetensors, checked by its features"""
    from ssl_pipeline import export

    source = _weights(args)
    difference = export.export(source.backbone, source.options, args.out, args.format)
    arguments = f", arguments {source.options.arguments}" if source.options.arguments else ""
    print(f"source: {source.name} ({source.options.name}{arguments})")
    print(f"largest difference of features, read back by {args.format}: {difference:.1e} (limit {export.TOLERANCE:g})")
    print(f"written to {args.out}")
    return Status.DONE


def train_detectron2(args: argparse.Namespace) -> int:
    """fine-tune and measure a detector on Detectron2, from a backbone: Table 3's Mask R-CNN and others"""
    from ssl_pipeline import distributed
    from ssl_pipeline.evaluation import detection

    if not distributed.start().is_main:
        logging.getLogger("ssl_pipeline").setLevel(logging.WARNING)
    source, into, name = distributed.together(lambda: _detection(args, distributed.world_size()))
    result = detection.run(source, args.preset, args.overrides, into.path, name)
    described = {"backbone": source.options.model_dump(mode="json")}
    return _record(args, into, name, result, {"weights": source.name}, described, detection.UNCHANGING)


def _detection(args: argparse.Namespace, ranks: int) -> tuple[Any, RunFolder, str]:
    """(source, whose results/, name of the result), all that can be checked before it runs having been. Raises BadInput."""
    from ssl_pipeline.evaluation import detection

    wrong = [text for text in args.overrides if "=" not in text or not text.split("=")[0].isupper()]
    if wrong:
        raise BadInput(f"{wrong[0]!r} is no option of Detectron2: give KEY.SUB=value, as in SOLVER.BASE_LR=0.03")
    into = _into(args.source, args.output, _run_of(args.source))
    if into is None:
        raise _nowhere(args)
    detection.preset_file(args.preset)
    detection.require_detectron2(args.datasets)
    source = _weights(args)
    detection.prepare(source, args.preset, args.overrides, ranks)
    return source, into, detection.result_name(args.preset, args.overrides, _end(args.source, args.random_init))


def report(args: argparse.Namespace) -> int:
    """write report.html and report.md: results of one run or several, beside the paper's tables"""
    from ssl_pipeline.evaluation import report
    from ssl_pipeline.pretrain import completed
    from ssl_pipeline.run_folder import RunFolder

    for path in report.write([RunFolder(run) for run in args.runs], args.output, complete=completed):
        print(path)
    return Status.DONE


def compare(args: argparse.Namespace) -> int:
    """what two runs differ in: config, versions, devices, pictures, and the step at which their metrics part"""
    from ssl_pipeline.evaluation import compare
    from ssl_pipeline.pretrain import completed
    from ssl_pipeline.run_folder import RunFolder

    found = compare.compare([RunFolder(run) for run in args.runs], completed, args.tolerance)
    text = json.dumps(found, indent=2) if args.json else compare.described(found)
    print("\n".join(map(printable, text.split("\n"))))
    return Status.DONE


def status(args: argparse.Namespace) -> int:
    """how a run stands: state, progress, speed, time left, restarts, last checkpoint, its jobs and results"""
    from ssl_pipeline.cluster import status
    from ssl_pipeline.run_folder import RunFolder

    print(status(RunFolder(args.run)))
    return Status.DONE


def _resources(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from ssl_pipeline import config, launch

    given = {name: getattr(args, name) for name in launch.Resources.model_fields}
    resources = config.validate(launch.Resources, {name: value for name, value in given.items() if value is not None})
    if resources.cluster != "slurm" and resources.nodes > 1:
        raise BadInput(f"--cluster {resources.cluster} has one node, not {resources.nodes}: give --nodes 1")
    if resources.cluster != "slurm" and resources.time is not None:
        raise BadInput(f"--cluster {resources.cluster} has no time limit: leave --time out")
    return resources


def _freeze(name: str, overrides: Sequence[str], output: Path, resources, write: bool):  # type: ignore[no-untyped-def]
    """The run folder with its resolved config in it, everything that can be checked here having been checked."""
    import torch

    from ssl_pipeline import config
    from ssl_pipeline.data.index import pretraining_index
    from ssl_pipeline.pretrain import PretrainConfig, consequences
    from ssl_pipeline.run_folder import RunFolder

    tree = config.load(name, overrides)
    options = config.validate(PretrainConfig, tree.values, tree)
    consequences(options, resources.ranks)
    train = options.data.root / "train"
    if resources.cluster != "slurm":
        pretraining_index(options.data.root, options.data.unlabelled)  # raises here what the job would
        if resources.gpus_per_node and torch.accelerator.current_accelerator(check_available=True) is None:
            raise BadInput(
                f"--gpus-per-node {resources.gpus_per_node}: torch sees no GPU on this machine; leave it out"
            )
    elif not train.is_dir() and not write:
        print(f"ssl-pipeline: {str(train)!r} cannot be seen from here; the job must see it", file=sys.stderr)
    run = RunFolder(output)
    if write:
        run.open_for_writing(options.model_dump(mode="json"))
        run.close()
    return run


def launch(args: argparse.Namespace) -> int:
    """submit another verb as a job: launch VERB ... --cluster slurm|local|debug --nodes N --gpus-per-node G ..."""
    from ssl_pipeline import launch
    from ssl_pipeline.run_folder import RunFolder

    resources = _resources(args)
    inner = _parse(args.words)
    if inner.verb not in (*launch.VERBS, "pretrain", "report"):
        raise BadInput(f"{inner.verb!r} is no job; launch pretrain, report, {', '.join(launch.VERBS)}")
    if inner.verb == "report" and resources.ranks > 1:
        raise BadInput("report is one process: give --nodes 1 and at most --gpus-per-node 1")
    source = (
        inner.output if inner.verb == "pretrain"
        else inner.runs[0] if inner.verb == "report"
        else Path(inner.sources[0]) if inner.verb == "spectrum"
        else inner.source
    )  # fmt: skip
    variants = _variants(args.array)
    if variants and inner.verb != "pretrain":
        raise BadInput("--array varies the options of pretraining")
    if inner.verb == "pretrain":
        for write in (False, True)[: 1 if args.dry_run else 2]:  # all are checked before any is written
            runs = [
                _freeze(
                    inner.config,
                    [*inner.overrides, *([variant] if variant else [])],
                    source / variant if variant else source,
                    resources,
                    write,
                )
                for variant in variants or [""]
            ]
        jobs = [launch.pretraining(run) for run in runs]
        folder = source / "logs"
    else:
        if inner.verb == "report":
            RunFolder(source).read_config()
        elif inner.verb == "spectrum":
            _spectra(inner)
        else:
            asked = (
                None if inner.verb == "train-detectron2" else _evaluation(inner)
            )  # what the job would raise hours later
            if asked is None:
                _detection(inner, resources.ranks)
            elif asked.protocol in ("imagenet", "fine-tuning") and asked.recipe.batch_size % resources.ranks:
                batch = asked.recipe.batch_size
                raise BadInput(
                    f"recipe.batch_size = {batch} cannot be divided by {resources.ranks} processes: ask for others"
                )
        runs = [run] if (run := _run_of(source)) is not None else []
        folder = (runs[0].path if runs else getattr(inner, "output", None) or source.parent) / "logs"
        jobs = [launch.Job(args.words)]
    if args.dry_run:
        for job in jobs:
            print(f"# ssl-pipeline {printable(shlex.join(job.words))}")
        print(launch.script(resources.sized(inner.verb), inner.verb, folder))
        return Status.DONE
    recorded = {"source": str(source)} if inner.verb != "pretrain" else {}
    submitted = launch.submit(jobs, resources, inner.verb, folder, runs[0] if runs else None, **recorded)
    print(launch.follow(submitted, resources, folder, runs))
    return Status.DONE


def requeue(args: argparse.Namespace) -> int:
    """inside a Slurm job: put it back into the queue, unless it is being cancelled or comes back anyway"""
    from ssl_pipeline.cluster import requeue

    requeue()
    return Status.DONE


def _variants(array: str | None) -> list[str]:
    """`key=v1,v2` -> [`key=v1`, `key=v2`]."""
    if array is None:
        return []
    key, equals, values = array.partition("=")
    if not equals or not all(values.split(",")):
        raise BadInput(f"--array {array!r} is not of the form key.sub=v1,v2")
    if ".." in Path(values.replace(",", "/")).parts:
        raise BadInput(f"--array {array!r} holds `..`, and its values name folders below RUN: give another")
    if len(set(values.split(","))) < len(values.split(",")):
        raise BadInput(f"--array {array!r} gives a value twice: two jobs would write to one folder")
    return [f"{key}={value}" for value in values.split(",")]


def experiment(args: argparse.Namespace) -> int:
    """submit pretraining and, depending on it, every evaluation and the report"""
    from ssl_pipeline import config, launch

    resources = _resources(args)
    if args.every is not None and args.every < 1:
        raise BadInput(f"--every {args.every} is no number of epochs: give 1 or more")
    if args.every and resources.cluster == "debug":
        raise BadInput("--every needs jobs beside the training: give --cluster slurm or local")
    overrides = [*args.overrides, *([f"checkpoint.backbone_every_epochs={args.every}"] if args.every else [])]
    run = _freeze(args.config, overrides, args.output, resources, write=not args.dry_run)
    values = config.load(args.config, overrides).values
    print(launch.experiment(run, resources, values, every=bool(args.every), dry_run=args.dry_run))
    return Status.DONE


def plan(args: argparse.Namespace) -> int:
    """what a pretraining will cost, and whether this cluster takes it; submits nothing"""
    from ssl_pipeline import config, launch

    tree = config.load(args.config, args.overrides)
    words = [args.config, *args.overrides]
    output = args.output or Path("runs") / Path(args.config).with_suffix("").as_posix().replace("/", "_")
    print(
        launch.plan(
            tree,
            words,
            output,
            _resources(args),
            measure_seconds=args.measure_seconds,
            images_per_second=args.images_per_second,
            pictures=args.pictures,
        )
    )
    return Status.DONE


def prepare_data(args: argparse.Namespace) -> int:
    """bring a data set into the layout train/<class>/<picture>, val/<class>/<picture>"""
    from ssl_pipeline.data.prepare import prepare

    counts = prepare(args.name, args.out, args.source, args.classes)
    print(f"{args.out}: pictures: {', '.join(f'{count:,} in {split}' for split, count in counts.items())}")
    return Status.DONE


def pack_shards(args: argparse.Namespace) -> int:
    """write train/ and val/ of a folder as tar shards, with the same ids, labels and classes; goes on where it was stopped"""
    from ssl_pipeline.data.pack import Encoding, pack

    if args.quality is not None and args.short_side is None:
        raise BadInput("--quality is of pictures that are encoded again: give --short-side too, or leave it out")
    encoding = None
    if args.short_side is not None:
        encoding = Encoding(args.short_side, 90 if args.quality is None else args.quality)
    size = _bytes("--shard-size", args.shard_size)
    done = pack(args.folder, args.out, shard_size=size, encoding=encoding, processes=_positive(args.processes))
    for split, packed in done.items():
        kept = f", {len(packed.kept):,} of them kept as they were" if packed.kept else ""
        if packed.empty:
            kept += f", {len(packed.empty):,} empty, which a run replaces, as {packed.empty[0]!r}"
        shards = f"{packed.shards:,} shard{'s' if packed.shards > 1 else ''}, {_size(packed.size)}"
        print(f"{args.out / split}: {packed.pictures:,} pictures{kept}, {shards}")
    return Status.DONE


def check_data(args: argparse.Namespace) -> int:
    """find every picture that a training would replace, in folders and shards, and count what is noteworthy"""
    from ssl_pipeline.data.check import check

    report = check(args.root, _positive(args.processes))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    for name, reason in report.bad:
        print(f"{printable(name)}: {printable(reason)}")
    for kind, count in sorted(report.noteworthy.items()):
        print(f"noteworthy: {count:,} {kind}, as {printable(report.examples[kind])}")
    print(f"{report.checked:,} pictures read below {printable(str(args.root))}, {len(report.bad):,} bad")
    return Status.BAD_INPUT if report.bad else Status.DONE


def _bytes(option: str, text: str) -> int:
    """`256MB` -> 256,000,000; MiB and the like are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", text)
    if match is None:
        raise BadInput(f"{option} {text!r} is no size: give, say, 256MB")
    number, unit, binary = match.groups()
    return round(
        float(number) * (1024 if binary else 1000) ** ("kMGT".index(unit.replace("K", "k")) + 1 if unit else 0)
    )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _positive(processes: int | None) -> int | None:
    if processes is not None and processes < 1:
        raise BadInput(f"--processes {processes} is no number of processes: give 1 or more")
    return processes


def bench_loader(args: argparse.Namespace) -> int:
    """measure a config's loader on this machine: images a second, CPU ms an image, bytes copied, cores for a GPU"""
    from ssl_pipeline import config
    from ssl_pipeline.data.bench import bench, described
    from ssl_pipeline.pretrain import PretrainConfig

    for option, value in (("seconds", args.seconds), ("gpu-images-per-second", args.gpu_images_per_second)):
        if not value > 0:
            raise BadInput(f"--{option} {value:g} measures nothing: give a number above 0")
    tree = config.load(args.config, args.overrides)
    options = config.validate(PretrainConfig, tree.values, tree)
    print(described(bench(options.data, options.seed, args.seconds), args.gpu_images_per_second))
    return Status.DONE


def demo(args: argparse.Namespace) -> int:
    """the whole way on handwritten digits in minutes: data, pretraining, evaluation, report"""
    from ssl_pipeline.demo import demo

    return demo(args.method, args.output, args.data)


# ------------------------------------------------------------------------------------------------------------- parsing
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssl-pipeline",
        description="Self-supervised pretraining of vision backbones, with SparseHead.",
        epilog="exit status: 0 done, 1 defect, 2 bad input, 75 stopped with a checkpoint (give the same command again), "
        "76 non-finite, 77 storage, 78 bad nodes",
    )
    parser.add_argument("--version", action="version", version=f"ssl-pipeline {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, action: Verb) -> argparse.ArgumentParser:
        told = (action.__doc__ or "").replace("%", "%%")  # argparse formats it
        verb = verbs.add_parser(name, help=told, description=action.__doc__, allow_abbrev=False)
        verb.set_defaults(action=action, overrides=None, usage=verb)
        return verb

    def add_overrides(verb: argparse.ArgumentParser) -> None:
        verb.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="options laid over the config", default=[]
        )

    verb = add("pretrain", pretrain)
    verb.add_argument("config", help="a YAML file or a packaged name, as cifar10/simclr")
    add_overrides(verb)
    verb.add_argument("--output", type=Path, required=True, metavar="RUN", help="the run folder; the same one goes on")

    verb = add("config", show_config)
    verb.add_argument("config", nargs="?", help="a YAML file or a packaged name; without one, the names are listed")
    add_overrides(verb)
    verb.add_argument("--explain", action="store_true", help="every value with the file that it came from")
    verb.add_argument("--ranks", type=int, default=1, help="number of processes to compute the per-rank batch for")

    for name, action in (
        ("knn", knn),
        ("linear-probe", linear_probe),
        ("semi-supervised", semi_supervised),
        ("analyze", analyze),
    ):
        verb = add(name, action)
        verb.add_argument("source", type=Path, help="a run folder, a file of weights, or timm:NAME or torchvision:NAME")
        add_overrides(verb)
        verb.add_argument("--config", help="config with data set and evaluation view, for a source that is no run")
        verb.add_argument("--random-init", action="store_true", help="the same backbone before any training")
        verb.add_argument("--data", type=Path, metavar="FOLDER", help="another labelled data set, with train/ and val/")
        verb.add_argument("--output", type=Path, metavar="FOLDER", help="where results and state go (default: the run)")
        if action is knn:
            verb.add_argument("--k", type=int, default=5, help="neighbours of the majority vote (default 5)")
            verb.add_argument("--temperature", type=float, default=0.07, help="of the weighted vote (default 0.07)")
        elif action is linear_probe:
            verb.add_argument(
                "--protocol",
                choices=("small", "imagenet", "logistic"),
                help="small: Adam on features; imagenet: SGD on crops and flips; logistic: L-BFGS on features "
                "(default: the data set's own, logistic with --data)",
            )
            verb.add_argument(
                "--preset", help="of the protocol imagenet: a method's name or a YAML file (default: the run's)"
            )
        elif action is analyze:
            verb.add_argument(
                "--pictures", type=int, default=1000, metavar="N", help="seen in two augmented views (default 1000)"
            )
            verb.add_argument(
                "--projection", choices=("pca", "tsne"), default="pca", help="to two dimensions (default pca)"
            )
            verb.add_argument("--split", choices=("val", "train"), default="val", help="which pictures (default val)")
        else:
            verb.add_argument("--percent", type=float, required=True, help="of train that keeps its labels: 1 or 10")
            verb.add_argument("--list", type=Path, metavar="FILE", help="names of the labelled pictures, one a line")
            verb.add_argument("--preset", help="a method's name or a YAML file (default barlow_twins)")
            verb.add_argument("--sweep", action="store_true", help="choose the rates on a held-out part of the labels")

    verb = add("spectrum", spectrum)
    verb.add_argument(
        "sources",
        nargs="+",
        metavar="RUN",
        help="run folders; of a bare backbone, as RUN/backbone.pth, r alone is measured; data.key=value changes where "
        "pictures are",
    )
    verb.add_argument("--split", default="val", help="folder of the data set to measure on (default val)")
    verb.add_argument("--config", help="config with data set and evaluation view, for weights that are of no run")
    verb.add_argument("--data", type=Path, metavar="FOLDER", help="another data set, with the split in it")
    verb.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where results go, and nothing elsewhere (default: the run; the picture "
        "of several runs: this folder)",
    )  # fmt: skip
    verb.set_defaults(overrides=[])

    def add_source(verb: argparse.ArgumentParser) -> None:
        verb.add_argument("source", type=Path, help="a run folder, a file of weights, or timm:NAME or torchvision:NAME")
        verb.add_argument("--config", help="config with backbone and data set, for a source that is no run")

    verb = add("convert-to-detectron2", convert_to_detectron2)
    add_source(verb)
    verb.add_argument("out", type=Path, metavar="OUT.pkl")

    verb = add("export", export)
    add_source(verb)
    verb.add_argument("out", type=Path, metavar="OUT", help="ends with .pth, .pt or .safetensors")
    verb.add_argument(
        "--format", required=True, choices=("torchvision", "timm", "safetensors"), help="whose names and networks"
    )

    verb = add("train-detectron2", train_detectron2)
    add_source(verb)
    verb.add_argument(
        "overrides", nargs="*", metavar="KEY.SUB=value", help="Detectron2's options, as SOLVER.BASE_LR=0.03", default=[]
    )
    verb.add_argument(
        "--preset",
        default="coco_mask_rcnn_c4_1x",
        help="a name in configs/detectron2 or a YAML file (default: Table 3's)",
    )
    verb.add_argument(
        "--datasets", type=Path, metavar="FOLDER", help="with coco/ or VOC2007/ in it (default: $DETECTRON2_DATASETS)"
    )
    verb.add_argument("--random-init", action="store_true", help="the same backbone before any training")
    verb.add_argument("--output", type=Path, metavar="FOLDER", help="where results and state go (default: the run)")

    def add_resources(verb: argparse.ArgumentParser) -> None:
        group = verb.add_argument_group("resources of the job")
        group.add_argument("--cluster", choices=("slurm", "local", "debug"), help="default slurm")
        for name in ("nodes", "gpus-per-node", "tasks-per-node", "cpus-per-task"):
            group.add_argument(f"--{name}", type=int, metavar="N")
        for name in ("mem", "partition", "account", "qos", "exclude", "constraint", "dependency"):
            group.add_argument(f"--{name}")
        group.add_argument("--time", help="limit of one slot, as 24:00:00; pretraining goes on in the next one")
        group.add_argument(
            "--signal-lead", type=int, metavar="S", help="seconds before it to save (default 300, or a fifth of it)"
        )

    verb = add("launch", launch)
    add_resources(verb)
    verb.add_argument("--array", metavar="key=v1,v2", help="a job a value, in RUN/key=v1 and so on")
    verb.add_argument("--dry-run", action="store_true", help="print the sbatch script, submit nothing")

    verb = add("experiment", experiment)
    verb.add_argument("config", help="a YAML file or a packaged name")
    add_overrides(verb)
    verb.add_argument("--output", type=Path, required=True, metavar="RUN")
    verb.add_argument("--every", type=int, metavar="N", help="also evaluate beside the training, every N epochs")
    verb.add_argument("--dry-run", action="store_true", help="print the sbatch scripts, submit nothing")
    add_resources(verb)

    verb = add("plan", plan)
    verb.add_argument("config", help="a YAML file or a packaged name")
    add_overrides(verb)
    verb.add_argument("--output", type=Path, metavar="RUN")
    verb.add_argument("--measure-seconds", type=int, default=60, help="time for a few steps here (default 60; 0: none)")
    verb.add_argument("--pictures", type=int, help="size of the training set, where it is not on this machine")
    verb.add_argument("--images-per-second", type=float, help="of one process, instead of measuring")
    add_resources(verb)

    add("requeue", requeue)

    add("status", status).add_argument("run", type=Path, metavar="RUN")
    verb = add("report", report)
    verb.add_argument("runs", type=Path, metavar="RUN", nargs="+")
    verb.add_argument("--output", type=Path, metavar="FOLDER", help="default: the run; of several runs, this folder")
    verb = add("compare", compare)
    verb.add_argument("runs", type=Path, metavar="RUN", nargs=2)
    verb.add_argument(
        "--tolerance", type=float, default=1e-3, metavar="T", help="relative, for the second step told (default 1e-3)"
    )
    verb.add_argument("--json", action="store_true", help="everything, as one JSON object")

    verb = add("bench-loader", bench_loader)
    verb.add_argument("config", help="a YAML file or a packaged name")
    add_overrides(verb)
    verb.add_argument("--seconds", type=float, default=30, help="how long to measure (default 30)")
    verb.add_argument(
        "--gpu-images-per-second",
        type=float,
        default=3400,
        metavar="N",
        help="what a GPU takes (default 3400: an H100)",
    )

    verb = add("prepare-data", prepare_data)
    verb.add_argument("name", help="digits, cifar10, cifar100, stl10, tiny_imagenet, imagenet100, imagenet or folder")
    verb.add_argument("out", type=Path)
    verb.add_argument(
        "--source", type=Path, nargs="+", default=[], metavar="PATH", help="archives or folders to take it from"
    )
    verb.add_argument("--classes", type=Path, metavar="FILE", help="imagenet100: its 100 wnids")

    verb = add("pack-shards", pack_shards)
    verb.add_argument("folder", type=Path, metavar="FOLDER", help="a data set with train/<class>/ and val/<class>/")
    verb.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that was begun with the same options")
    verb.add_argument("--shard-size", default="256MB", metavar="SIZE", help="of a shard at most (default 256MB)")
    verb.add_argument("--short-side", type=int, metavar="PIXELS", help="encode larger pictures again, this short")
    verb.add_argument("--quality", type=int, metavar="Q", help="of JPEG with --short-side, 1 to 100 (default 90)")
    verb.add_argument("--processes", type=int, metavar="N", help="that write (default: one a core)")

    verb = add("check-data", check_data)
    verb.add_argument("root", type=Path, metavar="ROOT", help="a data set's folder, of pictures or shards")
    verb.add_argument("--processes", type=int, metavar="N", help="that read and decode (default: one a core)")

    verb = add("demo", demo)
    verb.add_argument("--method", default="simclr")
    verb.add_argument("--output", type=Path, default=Path("runs/demo"))
    verb.add_argument("--data", type=Path, default=Path("data/digits"))
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # Overrides may stand after options too, which argparse alone does not allow.
    args, rest = parser.parse_known_args(arguments)
    if args.verb == "launch":
        args.words = rest
        if not rest:
            args.usage.error("launch what? As in: launch pretrain CONFIG --output RUN")
        return args
    if rest and (args.overrides is None or any(text.startswith("-") for text in rest)):
        args.usage.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.overrides is not None:
        args.overrides = [*args.overrides, *rest]
    return args


class _Lines(logging.Formatter):
    """A line a message, whatever the names in it hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: Sequence[str] | None = None, signals: bool = True) -> int:
    """Run a verb; returns the exit status. `signals`: answer SIGTERM, SIGUSR1 and SIGUSR2, ending with status 75."""
    args = _parse(arguments)
    before = {number: signal.getsignal(number) for number in preemption.SLURM_SIGNALS}
    args.signals = signals
    if signals:
        (preemption.note_signals if args.verb in RESUMED else preemption.stop_at_signals)()
    log = logging.getLogger("ssl_pipeline")
    if not log.handlers:  # our own logger's, not the root's: other libraries' messages stay theirs
        log.addHandler(logging.StreamHandler())
        log.handlers[0].setFormatter(_Lines("ssl-pipeline: %(message)s"))
    log.setLevel(logging.INFO)
    mask = os.umask(0o022)
    os.umask(mask | 0o022)  # what a run writes is its owner's: jobs run what lies in logs/
    try:
        status = int(args.action(args))
        if "torch.distributed" in sys.modules and status != Status.STOPPED:  # a stopped job's seconds are counted
            from ssl_pipeline import distributed

            distributed.stop()  # not after an error: the others may be in a collective, and leaving could wait for them
        return status
    except Stop as stop:
        if str(stop):  # empty on the ranks that stop because another one did
            # Where stderr is a file on the very disk that is full, the status must tell.
            with contextlib.suppress(OSError):
                print("ssl-pipeline: " + "\n".join(map(printable, str(stop).split("\n"))), file=sys.stderr, flush=True)
        return int(stop.status)
    except KeyboardInterrupt:
        print("ssl-pipeline: stopped by Ctrl-C; the same command starts again", file=sys.stderr)
        return int(Status.STOPPED)
    except BrokenPipeError:
        return int(Status.DONE)
    finally:
        os.umask(mask)
        if signals and args.verb not in RESUMED:
            for number, handler in before.items():
                signal.signal(number, handler)


def entry(arguments: Sequence[str] | None = None) -> None:
    """The program itself: `main`, and its status as the process's."""
    # What torch and timm make when imported stays, and Python looks through all of it for garbage every 700 objects.
    gc.set_threshold(10_000)
    leave(main(arguments))


def leave(status: int) -> NoReturn:
    """End this process with a status.

    A stopped job ends at once: all is saved, and a library that fails while the interpreter is taken apart must not
    take the status that brings the job back into the queue. One that lost a rank or its storage too: a library might wait
    for the other ranks, which learn of it by this end.
    """
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (
            AttributeError,
            OSError,
        ):  # none, or a file on a full disk: Python would try once more at its end, and make the status 120
            setattr(sys, name, None)
    if status in (Status.STOPPED, Status.RANK_LOST, Status.STORAGE, Status.NON_FINITE):
        logging.shutdown()
        os._exit(status)
    gc.freeze()  # Python would look through all that was imported for garbage, twice: a second
    sys.exit(status)


def tool(verb: str) -> None:
    """`entry` with the verb given: what the files under tools/ call."""
    entry([verb, *sys.argv[1:]])
