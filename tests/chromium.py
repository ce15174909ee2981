"""A headless Chromium for tests, driven over a pipe: the DevTools protocol, JSON messages that end in NUL.

No package and no port. The browser reads file descriptor 3 and writes file descriptor 4; each page is a flat
session of its own. Every call has a deadline, and leaving the ``with`` block ends the whole process family.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
MISSING = f"no browser: none of {', '.join(PROGRAMS)} on the PATH (Debian: apt-get install chromium)"
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root and containers cannot have one; only pages of this repository are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm of a container is small
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",  # a window of 1280 px gives the page 1280 px
    "--no-default-browser-check",
    "--no-first-run",
)
TALLEST = 16_000  # pixels; Chromium paints 16,384 and then begins again
LOUD = {"error", "warning", "assert"}

Message = dict[str, Any]


def find_program() -> str | None:
    """The first browser on the PATH."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Chromium:
    """One browser process. ``timeout_s`` is how long it may take to answer a call."""

    def __init__(self, program: str, folder: Path, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self.events: list[Message] = []
        self._calls = 0
        self._buffer = bytearray()
        self._log = folder / "chromium.log"
        (theirs_in, self._writer), (self._reader, theirs_out) = _pipe(), _pipe()
        command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        # The shell puts the pipe's ends on 3 and 4, whatever numbers they have here, and then is the browser.
        moved = f'exec "$@" 3<&{theirs_in} {theirs_in}<&- 4>&{theirs_out} {theirs_out}>&-'
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    ["bash", "-c", moved, "bash", *command],
                    pass_fds=(theirs_in, theirs_out),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._writer)  # the end of its input ends the browser, as a rule
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        os.close(self._reader)

    @property
    def pid(self) -> int:
        """Process id of the browser, which leads a process group of its own."""
        return self._process.pid

    def call(self, method: str, params: Message | None = None, session: str = "") -> Message:
        """Result of one command; what the browser reports meanwhile is kept in ``events``.

        Raises:
            RuntimeError: the browser refused the command.
            TimeoutError: no answer in time.
            ConnectionError: the browser has ended.
        """
        self._calls += 1
        message: Message = {"id": self._calls, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = session
        try:
            os.write(self._writer, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise ConnectionError(f"the browser ended before {method}; {self._last_words()}") from None
        deadline = time.monotonic() + self.timeout_s
        while (found := self._receive(deadline, method)).get("id") != self._calls:
            self.events.append(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return dict(found["result"])

    def wait_for(self, session: str, method: str, **params: Any) -> None:
        """Return once an event of the session with these parameters has come."""
        deadline = time.monotonic() + self.timeout_s
        seen = 0
        while True:
            for event in self.events[seen:]:
                is_it = (event.get("sessionId"), event.get("method")) == (session, method)
                if is_it and all(event["params"].get(name) == value for name, value in params.items()):
                    return
            seen = len(self.events)
            self.events.append(self._receive(deadline, method))

    def _receive(self, deadline: float, method: str) -> Message:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while (end := self._buffer.find(b"\0")) < 0:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                words = self._last_words()
                raise TimeoutError(f"the browser did not answer {method} in {self.timeout_s:g} s; {words}")
            part = os.read(self._reader, 1 << 20)
            if not part:
                raise ConnectionError(f"the browser ended during {method}; {self._last_words()}")
            self._buffer += part
        message = json.loads(self._buffer[:end])
        del self._buffer[: end + 1]
        return dict(message)

    def _last_words(self) -> str:
        return f"its last words: {self._log.read_text(errors='replace')[-2000:].strip() or 'none'}"


class Page:
    """One tab, seen from its first byte on: what it logs, throws and asks of the network."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser
        self._url = ""
        target = browser.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = browser.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = str(attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Page.setLifecycleEventsEnabled", enabled=True)
        self._target = target

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", {"targetId": self._target})

    def show_as(self, width: int, height: int, scheme: str, is_phone: bool) -> None:
        """Window size in CSS pixels, one device pixel each, and the reader's colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        wish = {"name": "prefers-color-scheme", "value": scheme}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self._call("Emulation.setEmulatedMedia", features=[wish, still])

    def open(self, url: str) -> None:
        """Load a page, with all that it refers to, and let it be painted."""
        self._url = url
        done = self._call("Page.navigate", url=url)
        if done.get("errorText"):
            raise RuntimeError(f"{url}: {done['errorText']}")
        self._browser.wait_for(self._session, "Page.lifecycleEvent", name="load", loaderId=done["loaderId"])
        self.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame)).then(() => 0)")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page; a promise is awaited."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def pictures(self, width: int) -> list[bytes]:
        """PNGs of the whole page, from top to end; more than one where it is too high for the browser."""
        height = int(self._call("Page.getLayoutMetrics")["cssContentSize"]["height"])
        tops = range(0, height, TALLEST)
        return [self.picture(width, min(TALLEST, height - top), top=top) for top in tops]

    def picture(self, width: int, height: int, top: int = 0, scale: float = 1.0) -> bytes:
        """PNG of a part of the page; ``scale`` pixels per CSS pixel."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": scale}
        taken = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(taken["data"])

    def complaints(self) -> list[str]:
        """What the page logged as an error or a warning, threw, or asked of anything but itself."""
        said, urls = [], {}
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            method, told = event["method"], event["params"]
            if method == "Runtime.consoleAPICalled" and told["type"] in LOUD:
                words = (str(part.get("value", part.get("description", ""))) for part in told["args"])
                said.append(f"console {told['type']}: {' '.join(words)}")
            elif method == "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                said.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
            elif method == "Log.entryAdded" and told["entry"]["level"] in LOUD:
                entry = told["entry"]
                said.append(f"log {entry['level']}: {entry['text']} {entry.get('url', '')}".rstrip())
            elif method == "Network.requestWillBeSent":
                urls[told["requestId"]] = url = told["request"]["url"]
                if url != self._url and not url.startswith("data:"):
                    said.append(f"request: {url}")
            elif method == "Network.loadingFailed":
                reason = told.get("blockedReason") or told["errorText"]
                said.append(f"failed request: {urls.get(told['requestId'], 'unknown')[:200]} {reason}")
            elif method == "Network.responseReceived" and told["response"]["status"] >= 400:
                said.append(f"failed request: {told['response']['url']} {told['response']['status']}")
        return said

    def _call(self, method: str, **params: Any) -> Message:
        return self._browser.call(method, params, self._session)


def _pipe() -> tuple[int, int]:
    """Reading and writing end, both with numbers that no child expects to mean something else."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
