"""Work for the processes of test_check.py and test_loader.py: a module of its own, since each process imports it."""

import json
import os
from pathlib import Path

from ssl_pipeline.exits import BadInput


def deadly(job: int) -> int:
    """The square, but 7 and 17 end the process."""
    if job % 10 == 7:
        os._exit(3)
    return job * job


def wrong(job: int) -> int:
    """What a worker raises."""
    raise BadInput(f"{job} does not do")


def loads(folder: str) -> None:
    """Print, as JSON, what loaders mark in `folder`/train, and what bisection alone finds in it, twice each."""
    from ssl_pipeline import config, distributed
    from ssl_pipeline.data.augment import ViewSpec
    from ssl_pipeline.data.index import image_folder
    from ssl_pipeline.data.loader import Loader, undecodable

    index = image_folder(Path(folder) / "train")
    view = config.validate(ViewSpec, {"size": 32, "ops": [{"op": "crop_resize"}, {"op": "normalize"}]})
    world = distributed.start()
    found: dict[str, list] = {"loader": [], "bisected": []}
    for seed in range(2):
        data = Loader(index, [view, view], 32, seed=seed, world=world, threads=2 + seed)
        for _ in range(2):
            for _ in data:
                pass
        found["loader"].append(dict(sorted(data.all_bad().items())))
        data.close()
        pictures = [index.read(sample) for sample in range(len(index))]
        found["bisected"].append(undecodable(pictures, "cpu", world.device, threads=2 + seed))
    print(json.dumps(found))
