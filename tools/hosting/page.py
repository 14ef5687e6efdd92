"""The server's own page in headless Chromium, driven by Selenium: how a workflow looks to the people who open it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
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
_LINKED = """
for (const node of window.app.graph.nodes)
    for (const input of node.inputs)
        if (input.link != null && input.widget) {
            const widget = node.widgets.find(each => each.name === input.widget.name);
            if (typeof widget.value === "string" && widget.type !== "combo") widget.value = "";
        }
"""
_MODERN = """
const [on, done] = arguments;
window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", on).then(() => done(null), e => done(String(e)));
"""
_DRAWN = """
return window.app.graph.nodes.every(node => document.querySelector(`[data-node-id="${node.id}"]`));
"""
_LEAST = """
return window.app.graph.nodes.map(node => [node.id, ...node.computeSize()]);
"""
_LEGIBLE = """
window.app.canvas.draw(true, true);
return !window.app.canvas.low_quality;
"""
_BOUNDS = """
const title = window.LiteGraph.NODE_TITLE_HEIGHT;
const box = node => [node.pos[0], node.pos[1] - title, node.size[0], node.size[1] + title];
return window.app.graph.nodes.map(node => [node.id, box(node)]);
"""
_BEHIND = """
const inset = 16, scale = 0.25, title = window.LiteGraph.NODE_TITLE_HEIGHT, graph = window.app.graph;
window.app.canvas.draw(true, true);
const boxes = graph.nodes.map(node => [node.id, node.pos[0] + inset, node.pos[1] - title + inset,
    node.pos[0] + node.size[0] - inset, node.pos[1] + node.size[1] - inset]);
const left = Math.min(...boxes.map(box => box[1])) - 200, top = Math.min(...boxes.map(box => box[2])) - 400;
const sheet = document.createElement("canvas");
sheet.width = (Math.max(...boxes.map(box => box[3])) + 200 - left) * scale;
sheet.height = (Math.max(...boxes.map(box => box[4])) + 200 - top) * scale;
const context = sheet.getContext("2d", {willReadFrequently: true});
const found = [];
for (const part of [...graph.links.values(), ...graph.reroutes.values()]) {
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, sheet.width, sheet.height);
    context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
    context.lineWidth = 4;
    context.stroke(part.path);
    const {data} = context.getImageData(0, 0, sheet.width, sheet.height);
    for (const [id, ...box] of boxes) {
        const [x0, y0, x1, y1] = box.map((value, axis) => Math.round((value - (axis % 2 ? top : left)) * scale));
        let met = false;
        for (let y = y0; y < y1 && !met; y++)
            for (let x = x0; x < x1 && !met; x++) met = data[4 * (y * sheet.width + x) + 3] > 100;
        if (met) found.push([part.origin_id ?? part.firstLink.origin_id, id]);
    }
}
return found;
"""
_SHOW = """
const [id, images] = arguments;
const detail = {node: id, display_node: id, prompt_id: "shown", output: {images}};
window.app.api.dispatchEvent(new CustomEvent("executed", {detail}));
"""
_TELL = """
const [id, text] = arguments;
window.app.api.dispatchEvent(new CustomEvent("progress_text", {detail: {nodeId: id, text}}));
"""
_LOADED = """
return window.app.graph.nodes.every(node => (node.imgs || []).every(image => image.complete));
"""
_BOX = """
const [name, kinds, widgets] = arguments;
const graph = window.app.graph, nodes = graph.nodes.filter(node => kinds.includes(node.type));
const {node} = graph.convertToSubgraph(new Set(nodes));
node.title = node.subgraph.name = name;
const shown = [];
for (const [from, widget, label] of widgets)
    for (const inner of node.subgraph.nodes)
        if (inner.type === from || inner.title === from) {
            shown.push([String(inner.id), widget]);
            if (!label) continue;
            inner.widgets.find(each => each.name === widget).label = label;
            inner.inputs.find(each => each.widget?.name === widget).label = label;
        }
node.properties.proxyWidgets = shown;
"""
_FIT = """
const boxes = [...window.app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 60, n.size[0], n.size[1] + 60])];
const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1])) - 60;
const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3])) + 40;
const ds = window.app.canvas.ds, element = window.app.canvas.canvas;
ds.scale = Math.min((element.clientWidth - 100) / (right - left), (element.clientHeight - 100) / (bottom - top), 1);
ds.offset = [-left + 80 / ds.scale, -top + 90 / ds.scale];
window.app.canvas.setDirty(true, true);
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

        found = find_browser()
        if found is None:
            raise ToolError(f"There is no browser to open the page with; {HOW_TO_GET}.")
        self._profile = Path(tempfile.mkdtemp(prefix="subject-patches-browser-"))
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        # The driver is on this machine.
        options.ignore_local_proxy_environment_variables()
        for option in (*_OPTIONS, f"--user-data-dir={self._profile}"):
            options.add_argument(option)
        try:
            self._driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
            self._driver.set_script_timeout(_SECONDS)
            self._driver.get(self._url)
            self._until(_READY)
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

    def forget_linked(self) -> None:
        """Empty the text fields of the open workflow whose text comes by a link: the page leaves something else there,
        such as what a node of the same number had before."""
        self._driver.execute_script(_LINKED)

    def missing(self) -> list[str]:
        """The types of the open workflow's nodes that the page does not know."""
        return self._driver.execute_script(_MISSING)

    def export(self) -> tuple[ApiPrompt, dict[str, Any]]:
        """The open workflow in API format and in UI format, as the page's menu exports and saves it."""
        error, prompt, workflow = self._driver.execute_async_script(_EXPORT)
        self._raise(error)
        return json.loads(prompt), json.loads(workflow)

    def modern(self, on: bool) -> None:
        """Draw nodes as Nodes 2.0 does, or on the canvas alone, as the page does by default."""
        self._raise(self._driver.execute_async_script(_MODERN, on))

    def least_sizes(self) -> dict[int, list[float]]:
        """The least width and height of each node of the open workflow on the canvas, by its number."""
        return {int(number): size for number, *size in self._driver.execute_script(_LEAST)}

    def grown(self) -> dict[int, list[float]]:
        """The bounds of the open workflow's nodes when all are drawn by Nodes 2.0, whose editors need room."""
        self._driver.execute_script(_FIT)
        self._until(_DRAWN)
        before: dict[int, list[float]] = {}
        while before != (now := self.bounds()):
            before = now
            self.settle()
        return now

    def legible(self) -> bool:
        """Whether the page draws words on the nodes: it leaves them away where they would be too small."""
        return self._driver.execute_script(_LEGIBLE)

    def bounds(self) -> dict[int, list[float]]:
        """Where each node of the open workflow lies, its title bar included: x, y, width and height by its number."""
        return {int(number): box for number, box in self._driver.execute_script(_BOUNDS)}

    def links_behind(self) -> list[tuple[int, int]]:
        """Where a link is drawn behind a node: the numbers of the node that it comes from and of the one in front."""
        self._driver.execute_script(_FIT)
        self.settle()
        return [(int(source), int(node)) for source, node in self._driver.execute_script(_BEHIND)]

    def box(self, name: str, kinds: Sequence[str], widgets: Sequence[tuple[str, ...]]) -> None:
        """Put the open workflow's nodes of these kinds into one box, a subgraph, that shows the widgets of theirs: the
        kind or the title of nodes, the widget's name, and what it is called there where the name says too little."""
        self._driver.execute_script(_BOX, name, list(kinds), [list(widget) for widget in widgets])

    def show_pictures(self, node: int, name: str, count: int) -> None:
        """Tell the page that an output node gave a picture of the server's input folder `count` times, as the server
        does at the end of a run."""
        images = [{"filename": name, "subfolder": "", "type": "input"}] * count
        self._driver.execute_script(_SHOW, str(node), images)

    def tell(self, node: int, text: str) -> None:
        """Tell the page what a node says while it runs, as the server does; it stays on the node."""
        self._driver.execute_script(_TELL, str(node), text)

    def settle(self) -> None:
        """Wait until pictures are loaded and drawn."""
        self._until(_LOADED)
        self._driver.execute_async_script("const [done] = arguments; setTimeout(done, 400);")

    def picture(self) -> bytes:
        """A PNG of the page with the whole workflow in sight."""
        self._driver.execute_script(_FIT)
        self.settle()
        return self._driver.get_screenshot_as_png()

    def _until(self, true: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self._driver, _SECONDS).until(lambda driver: driver.execute_script(true))

    def _raise(self, error: str | None) -> None:
        if error is not None:
            raise ToolError(f"The page refused the workflow: {error}")

    def _close(self) -> None:
        if self._driver is not None:
            self._driver.quit()
            self._driver = None
        if self._profile is not None:
            shutil.rmtree(self._profile, ignore_errors=True)
