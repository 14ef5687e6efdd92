"""The server's own page in headless Chromium, driven by Selenium: how a workflow looks to the people who open it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from .client import ApiPrompt
from .errors import ToolError

HOW_TO_GET = "install Chromium and its driver, on Debian and Ubuntu with: apt-get install chromium chromium-driver"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1600,1000",
)
_SECONDS = 90

_READY = """
return Boolean(window.app && window.app.graph && window.LiteGraph && window.app.vueAppReady !== false
    && Object.keys(window.LiteGraph.registered_node_types).length > 100);
"""
_LOAD = """
const [workflow, done] = arguments;
window.app.loadGraphData(workflow).then(() => done(null), error => done(String(error)));
"""
_LOAD_API = """
const [prompt, name, done] = arguments;
Promise.resolve(window.app.loadApiJson(prompt, name)).then(() => done(null), error => done(String(error)));
"""
_MISSING = """
const known = window.LiteGraph.registered_node_types;
return window.app.graph.nodes.map(node => node.type).filter(type => !(type in known));
"""
_EXPORT = """
const [done] = arguments;
window.app.graphToPrompt().then(
    result => done([null, JSON.stringify(result.output), JSON.stringify(result.workflow)]),
    error => done([String(error), null, null]));
"""


def find_browser() -> tuple[str, str] | None:
    """The paths of Chromium and of its driver, or None where one of them is not installed."""
    browser = next((path for path in map(shutil.which, _BROWSERS) if path), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Page:
    """The page at `url`, for a `with` block; raises ToolError where there is no browser."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._profile: Path | None = None
        self._driver: Any = None

    def __enter__(self) -> Page:
        from selenium import webdriver
        from selenium.webdriver.support.ui import WebDriverWait

        found = find_browser()
        if found is None:
            raise ToolError(f"There is no browser to open the page with; {HOW_TO_GET}.")
        self._profile = Path(tempfile.mkdtemp(prefix="subject-patches-browser-"))
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        for option in (*_OPTIONS, f"--user-data-dir={self._profile}"):
            options.add_argument(option)
        try:
            self._driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
            self._driver.set_script_timeout(_SECONDS)
            self._driver.get(self._url)
            WebDriverWait(self._driver, _SECONDS).until(lambda driver: driver.execute_script(_READY))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow in UI format, as dropping its file on the page does."""
        self._raise(self._driver.execute_async_script(_LOAD, workflow))

    def load_api(self, prompt: ApiPrompt, name: str) -> None:
        """Open a workflow in API format; the page lays its nodes out."""
        self._raise(self._driver.execute_async_script(_LOAD_API, prompt, name))

    def missing(self) -> list[str]:
        """The types of the open workflow's nodes that the page does not know."""
        return self._driver.execute_script(_MISSING)

    def export(self) -> tuple[ApiPrompt, dict[str, Any]]:
        """The open workflow in API format and in UI format, as the page's menu exports and saves it."""
        error, prompt, workflow = self._driver.execute_async_script(_EXPORT)
        self._raise(error)
        return json.loads(prompt), json.loads(workflow)

    def _raise(self, error: str | None) -> None:
        if error is not None:
            raise ToolError(f"The page refused the workflow: {error}")

    def _close(self) -> None:
        if self._driver is not None:
            self._driver.quit()
            self._driver = None
        if self._profile is not None:
            shutil.rmtree(self._profile, ignore_errors=True)
