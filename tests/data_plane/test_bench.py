from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline import cli, config
from ssl_pipeline.data import bench
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.pretrain import PretrainConfig

BURN = "import time\nwhile time.process_time() < 1.0: pass\n"


def test_the_process_tree_counts_children_that_live_and_that_have_ended() -> None:
    start = bench.process_tree_seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    ended = bench.process_tree_seconds() - start
    assert ended > 0.9
    shell = f"{BURN}\nprint('done', flush=True)\nimport sys; sys.stdin.read()"
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {shell!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", grandchild], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "done\n"
        assert bench.process_tree_seconds() - start - ended > 0.9
    own = time.process_time()
    assert bench.process_tree_seconds() >= own - 0.02


def test_what_a_loader_costs(photos: Path) -> None:
    words = [f"data.root={photos}", "data.batch_size=16", "data.threads=1"]
    options = config.validate(PretrainConfig, config.load("imagenet/byol", words).values)
    views = [view.model_copy(update={"size": 32}) for view in options.data.views]
    cost = bench.bench(options.data.model_copy(update={"views": views}), seed=0, seconds=0.5)
    assert (cost.batch, cost.threads, cost.placed) == (16, 1, "decode=cpu augment=cpu")
    assert cost.images_per_second > 0
    assert cost.cpu_ms > 0
    assert cost.cores(1000) == pytest.approx(cost.cpu_ms)
    from ssl_pipeline.data import randomness

    index = image_folder(photos / "train")
    files = [index.read(int(sample)) for sample in randomness.permutation(0, 0, len(index))[:16]]
    pixels = [np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB")) for data in files]
    assert cost.copied == {
        "decode=mixed": sum(map(len, files)),
        "decode=cpu": sum(x.nbytes for x in pixels),
        "augment=cpu": 16 * 2 * 3 * 32 * 32 * 4,
    }


def test_the_verb(few_digits: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
    words = ["bench-loader", "smoke", f"data.root={few_digits}", "--seconds", "0.3"]
    assert cli.main([*words, "--gpu-images-per-second", "500"]) == Status.DONE
    out = capsys.readouterr().out
    for said in ("images a second: ", "CPU ms an image: ", "MB by decode=mixed", "cores that feed a GPU of 500 images"):
        assert said in out
    assert cli.main([*words[:3], "--seconds", "0"]) == Status.BAD_INPUT
    assert "--seconds 0 measures nothing" in capsys.readouterr().err
    assert cli.main([*words[:3], "data.decode=mixed"]) == Status.BAD_INPUT
    assert "data.decode=mixed needs a GPU and torch sees none here" in capsys.readouterr().err


def test_it_reads_in_the_order_that_the_config_asks_for(photos: Path) -> None:
    words = [f"data.root={photos}", "data.batch_size=16", "data.shuffle=shards"]
    options = config.validate(PretrainConfig, config.load("imagenet/barlow_twins", words).values)
    with pytest.raises(BadInput, match="data.shuffle = shards reads tar shards"):
        bench.bench(options.data, 0, 0.1)
