"""ComfyUI's web interface in a real browser, used as a person uses it: files dropped, buttons pressed, words typed.

What it shows is read from the page, or from its graph where the canvas is only pixels.  Nothing waits for a time, only for
what is to happen.
"""

import json
import os
from pathlib import Path

import pytest
from comfy_host import Server

BROWSERS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
SEARCH = "Add a node..."  # what the empty search box says
RUN = 120_000  # milliseconds that a run may take on a slow machine

# A mask covers the page while it starts, and would stay there for good if something was dropped before it is gone.
READY = """() => window.app?.graph && window.app.vueAppReady !== false && !document.querySelector(".p-blockui-mask")
    && document.querySelector("[data-testid=queue-button]")?.checkVisibility()"""
DROP = """([name, text]) => {
    const files = new DataTransfer();
    files.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("canvas#graph-canvas") ?? document.querySelector("canvas");
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true,
                                                  clientX: 800, clientY: 500}));
}"""
TYPES = "() => window.app.graph.nodes.map(node => node.type).sort()"
# Listens before Run is pressed, so that a result from the cache is not missed.
LISTEN = """() => {
    window.ended = null;
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        window.app.api.addEventListener(kind, event => window.ended ??= {kind, at: performance.now(), ...event.detail});
}"""
# Notes when a node of this type says how far it is.
STARTED = """type => {
    window.started = false;
    window.app.api.addEventListener("progress", event => {
        window.started ||= window.app.graph.getNodeById(event.detail.node)?.type == type;
    });
}"""
SET = """([type, name, value]) => {
    for (const node of window.app.graph.nodes)
        if (node.type == type) node.widgets.find(widget => widget.name == name).value = value;
}"""
OPTIONS = """([type, name]) => window.app.graph.nodes.find(node => node.type == type)
    .widgets.find(widget => widget.name == name).options.values"""
# Every picture and video that nodes have given is there to be seen; a video's node grows when it is.
SHOWN = """() => window.app.graph.nodes.every(node => {
    if (!window.app.nodeOutputs[node.id]?.images?.length) return true;
    const video = node.videoContainer?.querySelector("video");
    if (video) return video.readyState >= 2 && node.size[1] > 200;
    return node.imgs?.length && node.imgs.every(image => image.complete);
})"""
FIT = """() => {
    window.app.canvas.deselectAll();  // else it fits what is selected
    return window.app.extensionManager.command.execute("Comfy.Canvas.FitView");
}"""
# Some frames after the view has come to rest; it glides where it goes.
STILL = """() => new Promise(resolve => {
    let last = "", same = 0;
    const look = () => {
        const view = [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset].join();
        window.app.graph.setDirtyCanvas(true, true);  // else it shows sizes from before the previews
        same = view == last ? same + 1 : 0;
        last = view;
        same > 3 ? resolve() : requestAnimationFrame(look);
    };
    look();
})"""
# Nodes this server does not have, and choices it does not offer: files that have to be downloaded.
UNKNOWN = "() => window.app.graph.nodes.map(node => node.type).filter(type => !window.LiteGraph.registered_node_types[type])"
NOT_THERE = """() => window.app.graph.nodes.flatMap(node => (node.widgets ?? []).filter(widget =>
    Array.isArray(widget.options?.values) && !widget.options.values.includes(widget.value)).map(widget => widget.value))"""
# Where in the page the title of a node is.
TITLE = """type => {
    const node = window.app.graph.nodes.findLast(node => node.type == type), {scale, offset} = window.app.canvas.ds;
    const box = window.app.canvas.canvas.getBoundingClientRect();
    return [box.left + (node.pos[0] + 60 + offset[0]) * scale, box.top + (node.pos[1] - 15 + offset[1]) * scale];
}"""
STATE = """() => {
    const {nodes, links} = window.app.graph.serialize();
    const told = ({id, type, pos, title, widgets_values}) => ({id, type, pos: [...pos], title, widgets_values});
    return {nodes: nodes.map(told), links: links.map(link => Object.values(link).slice(0, 6))};
}"""
# Whether the browser holds these words of a workflow for the next visit.
KEPT = """words => [...Object.values(localStorage), ...Object.values(sessionStorage)].some(text => text.includes(words))"""
# What the interface was told to be wrong with a node, before it ran or when it did.
ERROR_OF = """type => {
    const node = window.app.graph.nodes.find(node => node.type == type), {lastNodeErrors, lastExecutionError} = window.app;
    const before = lastNodeErrors?.[node.id]?.errors.map(error => `${error.message} ${error.details}`).join(" ");
    return before ?? (lastExecutionError?.node_id == node.id ? lastExecutionError.exception_message : null);
}"""
MARKED = "type => window.app.graph.nodes.find(node => node.type == type).has_errors"
# One of each of these types on a canvas of its own, below each other in columns, as they come out of the search.
LAY_OUT = """async types => {
    await window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
    window.app.graph.clear();
    let x = 0, y = 0, width = 0;
    for (const type of types) {
        const node = window.LiteGraph.createNode(type);
        window.app.graph.add(node);
        if (y && y + node.size[1] > 1000) [x, y, width] = [x + width + 40, 0, 0];
        node.pos = [x, y];
        y += node.size[1] + 60;
        width = Math.max(width, node.size[0]);
    }
}"""


class WebInterface:
    """One page of a browser, with the interface of ``server``; pictures of it go into ``folder``."""

    def __init__(self, page, server: Server, folder: Path):
        self.page, self.server, self.folder = page, server, folder

    def open(self) -> None:
        self.page.goto(self.server.url)
        self.page.wait_for_function(READY)

    def drop(self, name: str, text: str) -> None:
        """Drop a workflow's file on the canvas."""
        self.page.evaluate(DROP, [f"{name}.json", text])
        self.wait_for_nodes([node["type"] for node in json.loads(text)["nodes"]])

    def load(self, name: str, prompt: dict) -> None:
        """Put a graph in the queue's form on a canvas of its own.

        Its nodes need numbers that no graph before had: the front end gives a widget that is not named here the value
        which the widget of that number and name had there.
        """
        self.page.evaluate("([name, prompt]) => window.app.loadApiJson(prompt, name)", [name, prompt])
        self.wait_for_nodes([node["class_type"] for node in prompt.values()])

    def wait_for_nodes(self, types: list[str]) -> None:
        """Until the canvas shows nodes of these types and no others."""
        self.page.wait_for_function(f"types => JSON.stringify(({TYPES})()) == JSON.stringify(types)", arg=sorted(types))

    def set(self, node_type: str, widget: str, value) -> None:
        self.page.evaluate(SET, [node_type, widget, value])

    def press_run(self) -> None:
        self.page.evaluate(LISTEN)
        self.page.get_by_test_id("queue-button").click()

    def wait_for(self, what: str):
        """The value of ``window.what``, once the run has made it true."""
        try:
            return self.page.wait_for_function(f"() => window.{what}", timeout=RUN).json_value()
        except Exception as error:
            raise AssertionError(f"{error}\n{self.server.log.read_text()[-2000:]}") from None

    def run(self) -> dict:
        """Press Run; how it ended, with the results on the canvas."""
        self.press_run()
        ended = self.wait_for("ended")
        if ended["kind"] == "execution_success":
            self.page.wait_for_function(SHOWN)
        return ended

    def cancel_when_started(self, node_type: str) -> tuple[dict, float]:
        """Press Run, and Cancel once a node of this type is at work; how it ended, and how many seconds after Cancel."""
        self.page.evaluate(STARTED, node_type)
        self.press_run()
        self.wait_for("started")
        button = self.page.get_by_role("button", name="Cancel current run").first
        button.evaluate("button => button.addEventListener('click', () => window.cancelled = performance.now())")
        button.click()
        ended = self.wait_for("ended")
        return ended, (ended["at"] - self.page.evaluate("() => window.cancelled")) / 1000

    def picture(self, name: str, fit: bool = True) -> None:
        """Keep a picture of the page, the whole graph in view."""
        if fit:
            self.page.evaluate(FIT)
        self.page.evaluate(STILL)
        self.page.screenshot(path=self.folder / f"{name}.png")

    def search(self, words: str) -> list[str]:
        """Double-click the canvas and type ``words``; the names found, best first."""
        if not self.page.get_by_placeholder(SEARCH).is_visible():
            box = self.page.locator("canvas#graph-canvas").bounding_box()
            self.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] - 60)
        self.page.get_by_placeholder(SEARCH).fill(words)
        self.page.wait_for_function("""words => document.querySelector('[data-testid=result-item]')?.innerText
            && document.querySelector('[role=combobox]').value == words""", arg=words)
        return [item.split("\n")[0] for item in self.page.get_by_test_id("result-item").all_inner_texts()]

    def error_of(self, node_type: str) -> str:
        """What is wrong with the node of this type, once the interface says so."""
        return self.page.wait_for_function(ERROR_OF, arg=node_type).json_value()


def start_browser(server: Server, folder: Path):
    """A generator: one page with the web interface of ``server``, until it is closed.  Skips where there is no browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next((path for path in BROWSERS if Path(path).exists()), None)
    if browser_path is None:
        pytest.skip("no Chromium; looked for " + ", ".join(BROWSERS))
    folder = Path(os.environ.get("CVVAE_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 2400, "height": 1400})
        page.set_default_timeout(30_000)
        interface = WebInterface(page, server, folder)
        interface.open()
        yield interface
        browser.close()
