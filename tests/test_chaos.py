"""A run that is killed again and again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "benchmarks" / "chaos.py"


@pytest.mark.slow
def test_five_kills_leave_no_trace(tmp_path: Path) -> None:
    line = [sys.executable, str(CHAOS), "--kills", "5", "--seed", "1", "--work", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.match(r"kills 5 \(\d+ while a checkpoint was being written\), restarts 5, repeated steps \d+ ", last)
    assert last.endswith("equal to the last bit")
