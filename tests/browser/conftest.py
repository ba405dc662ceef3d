"""A real server with the default model, and Chromium to look at its pages with."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

DESKTOP = (1280, 900)


class Server:
    """`octavo serve` in a process of its own; runs one answer at a time, so a second one waits."""

    def __init__(self, *flags: str):
        command = [sys.executable, "-m", "octavo.cli", "serve", "--port", "0", *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"Listening on (http://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
                return
        raise AssertionError("the server did not start")

    def load(self) -> tuple[int, int]:
        """Answers that run and that wait."""
        load = httpx.get(f"{self.url}/load").json()
        return load["num_requests_running"], load["num_requests_waiting"]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Somebody else's endless answer runs."""
        body = {"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=20) as response:
            chunks = response.iter_bytes()  # held on to: when it goes, the stream is closed
            next(chunks)
            yield

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(20)
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server("--max-num-seqs", "1")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    """One browser for all tests; it can reach this machine and no other."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium: Debian's packages chromium and chromium-driver")
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",  # which cannot be had as root, as in a container; pages are our own
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium: Chrome, server: Server) -> Iterator[Chrome]:
    """The browser as if it came for the first time; the server is idle before and after."""
    chromium.set_window_size(*DESKTOP)
    chromium.get(f"{server.url}/health")
    chromium.execute_script("localStorage.clear(); sessionStorage.clear()")
    chromium.get_log("browser")
    yield chromium
    chromium.get("about:blank")
