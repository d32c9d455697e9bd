"""The run folder: where a run's files lie, which config it belongs to, and who may write to it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput, StorageFailure

CHANGEABLE = (
    "data.threads",
    "data.readers",
    "data.prefetch",
    "data.max_bad_fraction",
    "monitor.",
    "checkpoint.",
    "max_steps",
)
"""Keys in which a second start of a run may differ from the first: they do not change what is computed."""


class RunFolder:
    """Paths below one run's folder, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.views = path / "views.png"
        self.backbone = path / "backbone.pth"
        self.results = path / "results"
        self._lock: IO[str] | None = None

    def open_for_writing(self, values: Mapping[str, Any]) -> None:
        """Make the folder, take its lock, and write `values` as its config.

        Raises BadInput where another process writes here or the folder belongs to another config, StorageFailure where
        it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise StorageFailure(f"cannot write to the run folder {str(self.path)!r}: {error}") from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise BadInput(
                f"the run folder {str(self.path)!r} is being written by {owner}: stop it or name another --output"
            ) from None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        if self.config.is_file():
            self._require_same(values)
        elif any(self.checkpoints.glob("*.pt")):
            raise BadInput(f"{str(self.path)!r} holds checkpoints but no config.yaml: name another --output")
        partial = self.path / ".config.yaml.partial"
        try:
            partial.write_text(config.dump_yaml(values), encoding="utf-8")
            os.replace(partial, self.config)
        except OSError as error:
            raise StorageFailure(f"cannot write {self.config}: {error}; free room or name another --output") from None

    def _require_same(self, values: Mapping[str, Any]) -> None:
        old = config.flatten(self.read_config())
        new = config.flatten(values)
        changed = [
            f"  {key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(CHANGEABLE)
        ]
        if changed:
            raise BadInput(
                f"the run folder {str(self.path)!r} belongs to another config: give the same config to go on, or another "
                "--output. What differs:\n" + "\n".join(changed)
            )

    def read_config(self) -> dict[str, Any]:
        """The resolved config of this run. Raises BadInput where there is none."""
        if not self.config.is_file():
            raise BadInput(f"{str(self.path)!r} is no run folder: it has no config.yaml")
        values = config.parse_yaml(self.config.read_text(encoding="utf-8"), str(self.config))
        if not isinstance(values, dict):
            raise BadInput(f"{self.config} holds no mapping")
        return values

    def write_result(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write results/<name>.json."""
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"{name}.json"
        partial = self.results / f".{name}.json.partial"
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
