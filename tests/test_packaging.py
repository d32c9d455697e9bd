import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_resolves_a_config(tmp_path: Path) -> None:
    """The wheel alone is installed; its dependencies are lent by path, which no editable install of ours can follow."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(words, check=True)
    (wheel,) = tmp_path.glob("ssl_pipeline-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    words = [
        str(tmp_path / "empty" / "bin" / "ssl-pipeline"),
        "config",
        "imagenet/barlow_twins_sparsehead",
        "--explain",
    ]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "head.sparse.weight = 0.0001    # _sparsehead.yaml" in done.stdout
    program = "import ssl_pipeline; print(ssl_pipeline.__file__)"
    where = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "empty") in where.stdout
