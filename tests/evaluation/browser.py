"""A headless Chromium, driven through two pipes by the DevTools protocol: messages of JSON, each ended by a NUL.

https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SILENCE = 60
"""Seconds without a message after which it is taken to hang."""


def chromium() -> str | None:
    """The program; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a running Chromium."""

    def __init__(self, commands: int, answers: int) -> None:
        self.events: list[dict[str, Any]] = []
        """What it told without being asked, since `open`."""
        self._commands, self._answers, self._count, self._read = commands, answers, 0, b""
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], SILENCE)
            assert ready, f"Chromium has said nothing for {SILENCE} s"
            found = os.read(self._answers, 1 << 20)
            assert found, "Chromium has ended"
            self._read += found
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, dark: bool, media: str = "screen") -> None:
        """Load a file, and wait until it is there with all that belongs to it."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.ask("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What a line of JavaScript gives, awaited where it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """A PNG of the whole page."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def complaints(self) -> list[str]:
        """What stands in the console, and exceptions."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses that were asked for, but for the file itself and what lies in it."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:"))]


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A Chromium that reads commands from its descriptor 3 and answers on 4, with an empty profile."""
    commands, answers = os.pipe(), os.pipe()

    def give() -> None:
        # Copies first: 3 and 4 may be among the pipes' own.
        ours = os.dup(commands[0]), os.dup(answers[1])
        for there, descriptor in zip((3, 4), ours, strict=True):
            os.dup2(descriptor, there)

    with tempfile.TemporaryDirectory() as profile:
        words = [program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
        words += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        process = subprocess.Popen(words, pass_fds=(3, 4), preexec_fn=give, stderr=subprocess.DEVNULL)
        os.close(commands[0])
        os.close(answers[1])
        try:
            yield Browser(commands[1], answers[0])
        finally:
            os.close(commands[1])
            os.close(answers[0])
            process.terminate()
            process.wait(timeout=30)
