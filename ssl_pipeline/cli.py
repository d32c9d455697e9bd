"""`ssl-pipeline VERB`. What a verb needs is imported when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ssl_pipeline import __version__
from ssl_pipeline.exits import BadInput, Status, Stop

Verb = Callable[[argparse.Namespace], int]


# --------------------------------------------------------------------------------------------------------------- verbs
def pretrain(args: argparse.Namespace) -> int:
    """pretrain a backbone, or go on with a run that was stopped"""
    from ssl_pipeline import config
    from ssl_pipeline.pretrain import PretrainConfig, pretrain

    tree = config.load(args.config, args.overrides)
    return pretrain(config.validate(PretrainConfig, tree.values, tree), args.output)


def show_config(args: argparse.Namespace) -> int:
    """print a resolved config and what follows from it; runs nothing"""
    from ssl_pipeline import config
    from ssl_pipeline.pretrain import PretrainConfig, consequences

    if args.config is None:
        print("\n".join(config.packaged_names()))
        return Status.DONE
    if args.ranks < 1:
        raise BadInput(f"--ranks {args.ranks} is no number of processes: give 1 or more")
    tree = config.load(args.config, args.overrides)
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


def _evaluated(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The features' options of an evaluation verb, and the results folder's run (None for a bare file)."""
    from ssl_pipeline import config
    from ssl_pipeline.evaluation import features
    from ssl_pipeline.run_folder import RunFolder

    values = None
    if args.config is not None:
        values = config.load(args.config, args.overrides).values
    elif args.source.is_dir():
        tree = config.Tree()
        tree.merge(RunFolder(args.source).read_config(), str(args.source / "config.yaml"))
        config.apply_overrides(tree, args.overrides)
        values = tree.values
    options = features.options(args.source, values, args.random_init)
    return options, RunFolder(args.source) if args.source.is_dir() else None


def _report(args: argparse.Namespace, run, features, name: str, result: dict[str, float]) -> int:  # type: ignore[no-untyped-def]
    name = f"{name}_random_init" if args.random_init else name
    for key, value in result.items():
        print(f"{key}: {value:.2f} %")
    if run is not None:
        measured = {"weights": str(features.weights), "data_root": str(features.root)}
        print(f"written to {run.write_result(name, {**result, **measured})}")
    return Status.DONE


def knn(args: argparse.Namespace) -> int:
    """k-nearest-neighbour accuracy of a frozen backbone"""
    from ssl_pipeline import config
    from ssl_pipeline.evaluation import knn

    features, run = _evaluated(args)
    options = config.validate(knn.Options, {"features": features, "k": args.k, "temperature": args.temperature})
    return _report(args, run, features, "knn", knn.run(options))


def linear_probe(args: argparse.Namespace) -> int:
    """accuracy of a linear classifier on a frozen backbone's features (small-data protocol)"""
    from ssl_pipeline import config
    from ssl_pipeline.evaluation import linear

    features, run = _evaluated(args)
    options = config.validate(linear.Options, {"features": features, "epochs": args.epochs, "seed": args.seed})
    return _report(args, run, features, "linear_probe", linear.run(options))


def prepare_data(args: argparse.Namespace) -> int:
    """bring a data set into the layout train/<class>/<picture>, val/<class>/<picture>"""
    from ssl_pipeline.data.prepare import prepare

    counts = prepare(args.name, args.out, args.source)
    print(f"{args.out}: {counts['train']} pictures in train, {counts['val']} in val")
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
        "76 non-finite, 77 storage, 78 a rank was lost",
    )
    parser.add_argument("--version", action="version", version=f"ssl-pipeline {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, action: Verb) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=action.__doc__, description=action.__doc__)
        verb.set_defaults(action=action, overrides=None)
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

    for name, action in (("knn", knn), ("linear-probe", linear_probe)):
        verb = add(name, action)
        verb.add_argument("source", type=Path, help="a run folder, or a file of weights by torchvision's names")
        add_overrides(verb)
        verb.add_argument("--config", help="config with data, evaluation view and backbone, for a bare file of weights")
        verb.add_argument("--random-init", action="store_true", help="the same backbone before any training")
        if action is knn:
            verb.add_argument("--k", type=int, default=5, help="neighbours of the majority vote (default 5)")
            verb.add_argument("--temperature", type=float, default=0.07, help="of the weighted vote (default 0.07)")
        else:
            verb.add_argument("--epochs", type=int, default=500, help="default 500")
            verb.add_argument("--seed", type=int, default=0, help="of initial weights and order (default 0)")

    verb = add("prepare-data", prepare_data)
    verb.add_argument("name", help="digits, cifar10, cifar100 or folder")
    verb.add_argument("out", type=Path)
    verb.add_argument(
        "--source", type=Path, nargs="+", default=[], metavar="PATH", help="tars or folders to take it from"
    )

    verb = add("demo", demo)
    verb.add_argument("--method", default="simclr")
    verb.add_argument("--output", type=Path, default=Path("runs/demo"))
    verb.add_argument("--data", type=Path, default=Path("data/digits"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    parser = _parser()
    # Overrides may stand after options too, which argparse alone does not allow.
    args, rest = parser.parse_known_args(arguments)
    if rest and (args.overrides is None or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.overrides is not None:
        args.overrides = [*args.overrides, *rest]
    logging.basicConfig(format="ssl-pipeline: %(message)s", stream=sys.stderr)
    logging.getLogger("ssl_pipeline").setLevel(logging.INFO)
    try:
        status = int(args.action(args))
        if "torch.distributed" in sys.modules:
            from ssl_pipeline import distributed

            distributed.stop()  # not after an error: the others may be in a collective, and leaving could wait for them
        return status
    except Stop as stop:
        if str(stop):  # empty on the ranks that stop because another one did
            print(f"ssl-pipeline: {stop}", file=sys.stderr)
        return int(stop.status)
    except BrokenPipeError:
        return int(Status.DONE)


def tool(verb: str) -> int:
    """`main` with the verb given: what the files under tools/ call."""
    return main([verb, *sys.argv[1:]])
