"""All benchmarks, one after the other, each in a process of its own: every number beside its bound, in one table.

    python benchmarks/bench.py                    # or make bench; under 15 minutes on two cores
    python benchmarks/bench.py --only loader start

Without --only writes results/bench.json and results/bench.md beside this file. Exit status 1 where a bound is missed or a
benchmark fails; the others still run. What each number is, and what makes it: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from measure import Row, machine, table

HERE = Path(__file__).parent
BENCHMARKS = ("loader", "optim", "losses", "penalty", "step", "evaluation", "start")
"""Files beside this one, in the order of the table. The others there are experiments, which take hours and have no bound."""
LIMIT = 600.0
"""Seconds for one benchmark."""


@dataclass(frozen=True)
class Outcome:
    """What came of one benchmark."""

    rows: list[Row]
    failure: str
    """The end of its output where it failed; else empty."""
    seconds: float


def run(name: str) -> Outcome:
    """Run one benchmark; what it prints is kept for where it fails."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found, printed = Path(folder, "rows.json"), Path(folder, "output")
        with printed.open("wb") as file:  # not a pipe, which workers that outlive it would keep open
            line = [sys.executable, str(HERE / f"{name}.py"), "--json", str(found)]
            try:
                status = subprocess.run(line, stdout=file, stderr=file, timeout=LIMIT, check=False).returncode
                ended = f"exit status {status}"
            except subprocess.TimeoutExpired:
                status, ended = -1, f"not done after {LIMIT:.0f} s"
        rows = [Row(**row) for row in json.loads(found.read_text())] if found.is_file() else []
        good = bool(rows) and status == any(row.missed for row in rows)
        tail = "\n".join(printed.read_text(errors="replace").splitlines()[-20:])
        return Outcome(rows, "" if good else f"{ended}\n{tail}", time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    only = parser.parse_args().only
    outcomes: dict[str, Outcome] = {}
    for name in only or BENCHMARKS:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        outcomes[name] = run(name)
        print(f"{outcomes[name].seconds:.0f} s", file=sys.stderr, flush=True)
    rows = [replace(row, what=f"{name}: {row.what}") for name, outcome in outcomes.items() for row in outcome.rows]
    missed = [row.what for row in rows if row.missed]
    failed = {name: outcome.failure for name, outcome in outcomes.items() if outcome.failure}
    date = time.strftime("%Y-%m-%d")
    minutes = sum(outcome.seconds for outcome in outcomes.values()) / 60
    verdict = [f"- missed: {what}" for what in missed] + [f"- failed: {name}" for name in failed]
    text = "\n".join(
        [table(rows), "", f"{machine()} {date}, {minutes:.1f} minutes.", *([""] if verdict else []), *verdict]
    )
    print(text)
    for name, failure in failed.items():
        print(f"\n{name} failed: {failure}")
    if only is None:
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        head = [
            "# All benchmarks",
            "",
            "`make bench`. A value is the median of the rounds, beside the least and the most of them; what each row is:",
            "[performance.md](../../docs/performance.md).",
        ]
        (results / "bench.md").write_text("\n".join([*head, "", text, ""]))
        record = {
            "date": date,
            "machine": machine(),
            "seconds": {name: round(outcome.seconds, 1) for name, outcome in outcomes.items()},
            "rows": [asdict(row) for row in rows],
            "missed": missed,
            "failed": failed,
        }
        (results / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
