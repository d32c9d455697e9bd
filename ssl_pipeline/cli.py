"""`ssl-pipeline VERB`. What a verb needs is imported when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ssl_pipeline import __version__, preemption
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

    values = None
    run = _run_of(args.source)
    if args.config is not None:
        values = config.load(args.config, args.overrides).values
    elif run is not None:
        tree = config.Tree()
        tree.merge(run.read_config(), str(run.config))
        config.apply_overrides(tree, args.overrides)
        values = tree.values
    return features.options(args.source, values, args.random_init), run


def _run_of(source: Path):  # type: ignore[no-untyped-def]
    """The run that a folder is, or that a bare backbone RUN/backbones/epoch_0100.pth belongs to; None for other files."""
    from ssl_pipeline.run_folder import RunFolder

    if source.is_dir():
        return RunFolder(source)
    run = RunFolder(source.absolute().parent.parent)
    return run if source.absolute().parent == run.backbones and run.config.is_file() else None


def _report(args: argparse.Namespace, run, features, name: str, result: dict[str, float]) -> int:  # type: ignore[no-untyped-def]
    name = f"{name}_random_init" if args.random_init else name
    name = f"{name}_{args.source.stem}" if args.source.is_file() else name
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


def report(args: argparse.Namespace) -> int:
    """write RUN/report.html: results, loss, views"""
    from ssl_pipeline.evaluation.report import of_run
    from ssl_pipeline.run_folder import RunFolder

    print(of_run(RunFolder(args.run)))
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
    from ssl_pipeline.data.index import read_index
    from ssl_pipeline.pretrain import PretrainConfig, consequences
    from ssl_pipeline.run_folder import RunFolder

    tree = config.load(name, overrides)
    options = config.validate(PretrainConfig, tree.values, tree)
    consequences(options, resources.ranks)
    train = options.data.root / "train"
    if resources.cluster != "slurm":
        read_index(train)  # raises here what the job would
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
    if inner.verb not in (*launch.EVALUATIONS, "pretrain", "report"):
        raise BadInput(f"{inner.verb!r} is no job; launch pretrain, report, {', '.join(launch.EVALUATIONS)}")
    if inner.verb != "pretrain" and resources.ranks > 1:
        raise BadInput(f"{inner.verb} is one process: give --nodes 1 and at most --gpus-per-node 1")
    source = inner.output if inner.verb == "pretrain" else inner.run if inner.verb == "report" else inner.source
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
        else:
            _evaluated(inner)  # raises here what the job would raise hours later
        runs = [run] if (run := _run_of(source)) is not None else []
        folder = (runs[0].path if runs else source.parent) / "logs"
        jobs = [launch.Job(args.words)]
    if args.dry_run:
        for job in jobs:
            print(f"# ssl-pipeline {shlex.join(job.words)}")
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
    if len(set(values.split(","))) < len(values.split(",")):
        raise BadInput(f"--array {array!r} gives a value twice: two jobs would write to one folder")
    return [f"{key}={value}" for value in values.split(",")]


def experiment(args: argparse.Namespace) -> int:
    """submit pretraining and, depending on it, every evaluation and the report"""
    from ssl_pipeline import launch

    resources = _resources(args)
    if args.every is not None and args.every < 1:
        raise BadInput(f"--every {args.every} is no number of epochs: give 1 or more")
    if args.every and resources.cluster == "debug":
        raise BadInput("--every needs jobs beside the training: give --cluster slurm or local")
    overrides = [*args.overrides, *([f"checkpoint.backbone_every_epochs={args.every}"] if args.every else [])]
    run = _freeze(args.config, overrides, args.output, resources, write=not args.dry_run)
    print(launch.experiment(run, resources, every=bool(args.every), dry_run=args.dry_run))
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
        "76 non-finite, 77 storage, 78 bad nodes",
    )
    parser.add_argument("--version", action="version", version=f"ssl-pipeline {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, action: Verb) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=action.__doc__, description=action.__doc__, allow_abbrev=False)
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

    for name, action in (("status", status), ("report", report)):
        add(name, action).add_argument("run", type=Path, metavar="RUN")

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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # Overrides may stand after options too, which argparse alone does not allow.
    args, rest = parser.parse_known_args(arguments)
    if args.verb == "launch":
        args.words = rest
        if not rest:
            parser.error("launch what? As in: launch pretrain CONFIG --output RUN")
        return args
    if rest and (args.overrides is None or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.overrides is not None:
        args.overrides = [*args.overrides, *rest]
    return args


def main(arguments: Sequence[str] | None = None, signals: bool = True) -> int:
    """Run a verb; returns the exit status. `signals`: answer SIGTERM, SIGUSR1 and SIGUSR2, ending with status 75."""
    args = _parse(arguments)
    before = {number: signal.getsignal(number) for number in preemption.SLURM_SIGNALS}
    if signals:
        (preemption.note_signals if args.verb == "pretrain" else preemption.stop_at_signals)()
    log = logging.getLogger("ssl_pipeline")
    if not log.handlers:  # our own logger's, not the root's: other libraries' messages stay theirs
        log.addHandler(logging.StreamHandler())
        log.handlers[0].setFormatter(logging.Formatter("ssl-pipeline: %(message)s"))
    log.setLevel(logging.INFO)
    try:
        status = int(args.action(args))
        if "torch.distributed" in sys.modules and status != Status.STOPPED:  # a stopped job's seconds are counted
            from ssl_pipeline import distributed

            distributed.stop()  # not after an error: the others may be in a collective, and leaving could wait for them
        return status
    except Stop as stop:
        if str(stop):  # empty on the ranks that stop because another one did
            print(f"ssl-pipeline: {stop}", file=sys.stderr)
        return int(stop.status)
    except BrokenPipeError:
        return int(Status.DONE)
    finally:
        if signals and args.verb != "pretrain":
            for number, handler in before.items():
                signal.signal(number, handler)


def tool(verb: str) -> int:
    """`main` with the verb given: what the files under tools/ call."""
    return main([verb, *sys.argv[1:]])
