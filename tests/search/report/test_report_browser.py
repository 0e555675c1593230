"""The report in a real browser: Chromium without a window, driven through its own debugging pipe."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archspec.search.report import write_report

MakeRun = Callable[..., Path]

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
WAIT_S = 60.0  # a busy machine of two cores can take long to start a browser
READ_END, WRITE_END = 3, 4  # the descriptors --remote-debugging-pipe speaks on
HOSTILE = "<script>window.harmed = 'name'; alert(1)</script><img src=x onerror=\"window.harmed = 'image'\">"


def browser_path() -> str:
    """Return the browser; without one the test fails, since nothing else looks at the page."""
    found = next(filter(None, map(shutil.which, NAMES)), MAC if Path(MAC).exists() else None)
    if found is None:
        pytest.fail("no Chromium found; install it: 'apt-get install chromium', or 'brew install --cask google-chrome'")
    return found


class Page:
    """One tab: commands go in and events come out as JSON texts, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        browser_reads, we_write = os.pipe()
        we_read, browser_writes = os.pipe()
        # Numbers well above 3 and 4, so that moving one there cannot close the other.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (browser_reads, browser_writes)]
        path = browser_path()
        moves = [(os.POSIX_SPAWN_DUP2, ends[0], READ_END), (os.POSIX_SPAWN_DUP2, ends[1], WRITE_END)]
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        arguments = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawn(path, arguments, os.environ, file_actions=[*moves, *quiet], setpgroup=0)
        for end in (browser_reads, browser_writes, *ends):
            os.close(end)
        self.writer, self.reader = os.fdopen(we_write, "wb", 0), we_read
        os.set_blocking(we_read, False)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come in between are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for answer in self._receive():
                if answer.get("id") != self.number:
                    self.events.append(answer)
                elif "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                else:
                    return dict(answer["result"])
        raise AssertionError(f"{method}: no answer from the browser within {WAIT_S:.0f} s")

    def _receive(self) -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.reader, 1 << 20):
                self.buffer += chunk
        *whole, self.buffer = self.buffer.split(b"\0")
        if not whole:
            time.sleep(0.005)
        return [json.loads(text) for text in whole]

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a file in a window of this size and wait until its script is done."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + WAIT_S
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}; {self.complaints()}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Move the pointer to an element's middle and click."""
        place = f"(() => {{ const node = document.querySelector({json.dumps(selector)}); "
        place += "node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect(); "
        place += "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        x, y = self.evaluate(place)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for action in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=action, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, text: str = "") -> None:
        """Press a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def complaints(self) -> list[str]:
        """Return everything that went wrong in the page so far: errors, warnings, dialogs."""
        self.evaluate("1")  # whatever was sent before this answer has arrived
        found = []
        for event in self.events:
            method, details = event.get("method", ""), event.get("params", {})
            bad_console = method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert")
            bad_log = method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning")
            if bad_console or bad_log or method in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                found.append(json.dumps(details)[:400])
        return found

    def requests(self) -> list[str]:
        """Return the addresses the page asked for."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        """End the browser and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.writer.close()
        os.close(self.reader)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Yield a tab of a browser that the tests of this file share."""
    opened = Page(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture
def page(tab: Page) -> Page:
    """Return the tab, empty and with nothing held against it."""
    tab.call("Page.navigate", url="about:blank")
    tab.wait("location.href === 'about:blank'")
    tab.events.clear()
    return tab


def test_a_point_can_be_clicked_and_shows_its_spec(page: Page, make_run: MakeRun) -> None:
    page.open(write_report(make_run(60)))
    trained = page.evaluate("document.querySelectorAll('#plot .point:not(.untrained)').length")
    assert trained == 14  # three baselines, and 5, 10, ... 55
    assert page.evaluate("document.querySelectorAll('#plot .area').length") == 1

    page.click('#plot .point[data-trial="45"]')
    assert page.evaluate("document.querySelector('#detail h2').textContent") == "quick-45"
    spec = page.evaluate("document.querySelector('#spec').textContent")
    assert spec.startswith("name: quick-45\nmodel_dim: 64\n")
    assert "memory: kv" in spec
    assert page.evaluate("document.querySelectorAll('#detail .chart .curve').length") == 4
    assert "tiled" not in page.evaluate("document.querySelector('#detail').textContent")
    assert "solve one triangular system" in page.evaluate("document.querySelector('#detail').textContent")
    assert page.evaluate("location.hash") == "#trial-45"
    assert page.evaluate("document.querySelector('#trials tr.selected').dataset.trial") == "45"
    assert page.complaints() == []


def test_the_page_shows_growth_and_maps_of_choices(page: Page, make_run: MakeRun) -> None:
    page.open(write_report(make_run(150)))
    assert page.evaluate("document.querySelectorAll('#growth .chart .curve').length") == 2
    assert "32 trials" in page.evaluate("document.querySelector('#growth').textContent")
    assert page.evaluate("document.querySelectorAll('#analysis .heatmap').length") == 4  # two maps of two scores
    shade = "getComputedStyle(document.querySelector('#analysis .heat-{level}')).backgroundColor"
    assert page.evaluate(shade.format(level=4)) != page.evaluate(shade.format(level=0))
    assert "not enough evidence" in page.evaluate("document.querySelector('#analysis').textContent")
    assert "provisional: no member is re-scored" in page.evaluate("document.querySelector('#run').textContent")
    assert page.complaints() == []


def test_a_hostile_name_does_no_harm(page: Page, make_run: MakeRun) -> None:
    hostile = {1: HOSTILE, 5: "</script><script>window.harmed = 'data'</script>", 0: "<!--<script>", 15: "@@SCRIPT@@"}
    page.open(write_report(make_run(20, names=hostile)))
    for number, name in hostile.items():
        page.click(f'#plot .point[data-trial="{number}"]')
        assert page.evaluate("document.querySelector('#detail h2').textContent") == name
        assert name in page.evaluate("document.querySelector('#trials').textContent")
    assert page.evaluate("window.harmed ?? 'unharmed'") == "unharmed"
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    # Were such text ever taken for markup, the page's policy would still not run it.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.harmed = 1'}))")
    assert page.evaluate("window.harmed ?? 'unharmed'") == "unharmed"


def test_keys_reach_every_point(page: Page, make_run: MakeRun) -> None:
    page.open(write_report(make_run(40)))
    assert page.evaluate("document.querySelectorAll('#plot .point[tabindex=\"0\"]').length") == 1
    page.evaluate("document.querySelector('#plot .point[tabindex=\"0\"]').focus()")
    page.press("Home")
    seen = [page.evaluate("document.activeElement.dataset.trial")]
    for _ in range(page.evaluate("document.querySelectorAll('#plot .point').length") - 1):
        page.press("ArrowRight")
        seen.append(page.evaluate("document.activeElement.dataset.trial"))
    assert len(set(seen)) == page.evaluate("document.querySelectorAll('#plot .point').length") == 10
    assert page.evaluate("document.querySelector('.tooltip').hidden") is False
    page.press("Enter", "\r")
    chosen = page.evaluate("document.activeElement.querySelector('title').textContent")
    assert page.evaluate("document.querySelector('#detail h2').textContent") == chosen
    assert page.complaints() == []


def test_axes_table_and_filter_answer(page: Page, make_run: MakeRun) -> None:
    page.open(write_report(make_run(60)))
    choose = "(() => { const box = document.getElementById('axis-x'); box.value = 'recall_at_init'; "
    page.evaluate(choose + "box.dispatchEvent(new Event('change')); return 0; })()")
    assert "recall at init" in page.evaluate("document.querySelector('#plot').textContent")
    choose = choose.replace("axis-x", "axis-y").replace("recall_at_init", "memory_capacity")
    page.evaluate(choose + "box.dispatchEvent(new Event('change')); return 0; })()")
    assert page.evaluate("document.querySelectorAll('#plot .point').length") == 60  # untrained ones have both
    assert page.evaluate("document.querySelectorAll('#plot .area').length") == 0  # no front where untrained trials lie
    stroke = "getComputedStyle(document.querySelector('#plot .untrained .mark')).stroke"
    card = "getComputedStyle(document.querySelector('#plot-card')).backgroundColor"
    assert page.evaluate(stroke) != page.evaluate(card), "a mark in the colour of its ground cannot be seen"
    page.click("#trials [data-sort='recall/accuracy']")
    first = "document.querySelector('#trials tbody tr .pick').textContent"
    assert page.evaluate(first) == "gated_deltanet"  # greatest first where greater is better
    page.click("#trials [data-sort='recall/accuracy']")
    assert page.evaluate(first) == "transformer"
    typed = "(() => { const box = document.getElementById('filter'); box.value = 'momentum quick-2'; "
    page.evaluate(typed + "box.dispatchEvent(new Event('input')); return 0; })()")
    shown = page.evaluate("[...document.querySelectorAll('#trials tbody tr')].map((row) => Number(row.dataset.trial))")
    assert set(shown) == {20, 26}
    assert page.complaints() == []


@pytest.mark.parametrize("width", [1280, 700])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_stays_at_home(page: Page, make_run: MakeRun, width: int, scheme: str) -> None:
    report = write_report(make_run(40))
    page.open(report, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#plot svg').getBoundingClientRect().width") > 0.5 * min(width, 1000)
    labels = "[...document.querySelectorAll('#plot .tick')].map((node) => node.textContent)"
    assert len(page.evaluate(labels)) >= 7
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 60) == (scheme == "dark")
    assert page.requests() == [report.as_uri()]
    assert page.complaints() == []


def test_the_figure_can_be_saved_on_its_own(page: Page, make_run: MakeRun) -> None:
    page.open(write_report(make_run(40, names={5: "a < b & c"})))
    figure = page.evaluate("figureText()")
    assert figure.startswith("<svg")
    assert "var(" not in figure
    assert 'class="' not in figure
    assert "a &lt; b &amp; c" in figure
    parsed = "new DOMParser().parseFromString(figureText(), 'image/svg+xml').querySelectorAll('parsererror').length"
    assert page.evaluate(parsed) == 0
    assert page.complaints() == []
