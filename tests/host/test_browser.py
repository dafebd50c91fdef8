"""What a user does: drop a workflow file on the canvas, press Run, look at the result."""

import os
import shutil
from pathlib import Path

import pytest
from comfy_host import REPOSITORY

BROWSERS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")

DROP = """([name, text]) => {
    const files = new DataTransfer();
    files.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("canvas#graph-canvas") ?? document.querySelector("canvas");
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true,
                                                  clientX: 800, clientY: 500}));
}"""
# Listens before Run is pressed, so that a result from the cache is not missed.
LISTEN = """() => {
    window.ended = new Promise(resolve => {
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
            window.app.api.addEventListener(kind, event => resolve({kind, ...event.detail}));
    });
}"""
# Resolves when a finetune has taken its first step.
STARTED = """() => {
    const finetune = window.app.graph.nodes.find(node => node.type == "CVVAEFinetune");
    window.started = new Promise(resolve => window.app.api.addEventListener("progress", event => {
        if (event.detail.node == finetune.id) resolve();
    }));
}"""
SET = """([type, name, value]) => {
    for (const node of window.app.graph.nodes)
        if (node.type == type) node.widgets.find(widget => widget.name == name).value = value;
}"""
# A video's node grows when its preview is there.
SHOWN = """() => window.app.graph.nodes.every(node => {
    const video = node.videoContainer?.querySelector("video");
    if (["SaveImage", "PreviewImage"].includes(node.type)) return node.imgs?.every(image => image.complete);
    return node.type != "SaveVideo" || video?.readyState >= 2 && node.size[1] > 200;
})"""


@pytest.fixture(scope="module")
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next((path for path in BROWSERS if Path(path).exists()), None)
    if browser_path is None:
        pytest.skip("no Chromium; looked for " + ", ".join(BROWSERS))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1800, "height": 1100})
        browser.close()


@pytest.mark.parametrize("host", ["newest"], indirect=True)
@pytest.mark.parametrize("name", ["cv-vae_image_round_trip", "cv-vae_video_round_trip"])
def test_drop_and_run(server, page, tmp_path, workflows, name):
    drop(page, server, name, workflows[name])
    ended = press_run(page)
    take_picture(page, tmp_path / f"{name}.png")
    assert ended["kind"] == "execution_success", ended
    assert_saved(server, ended, workflows[name], "SaveImage", "SaveVideo")


@pytest.mark.parametrize("host", ["newest"], indirect=True)
def test_cancel_a_finetune_and_go_on(server, page, tmp_path, workflows):
    name = "cv-vae_finetune"
    drop(page, server, name, workflows[name])
    page.evaluate(SET, ["CVVAEFinetune", "run", "in_the_browser"])
    page.evaluate(SET, ["CVVAEEvaluate", "frames", 5])
    run = server.base / "output" / "cv-vae" / "in_the_browser"

    page.evaluate(STARTED)
    page.evaluate(LISTEN)
    page.get_by_test_id("queue-button").click()
    page.evaluate("() => window.started")
    page.get_by_role("button", name="Cancel current run").first.click()
    assert page.evaluate("() => window.ended")["kind"] == "execution_interrupted"
    taken = int(max((run / "checkpoints").iterdir()).stem.removeprefix("step_"))
    assert taken >= 1 and not (run / "model.safetensors").exists()

    page.evaluate(SET, ["CVVAEFinetune", "steps", taken + 1])
    ended = press_run(page)
    take_picture(page, tmp_path / f"{name}.png")
    assert ended["kind"] == "execution_success", ended
    assert_saved(server, ended, workflows[name], "PreviewImage")
    assert len((run / "losses.csv").read_text().splitlines()) == 1 + taken + 1
    assert f"at step {taken}." in server.log.read_text()


def drop(page, server, name: str, workflow: dict) -> None:
    """Open the web interface and drop the workflow's file on its canvas."""
    page.goto(server.url)
    page.wait_for_function("() => window.app?.graph && window.app.vueAppReady !== false")
    page.wait_for_timeout(1000)
    page.evaluate(DROP, [f"{name}.json", (REPOSITORY / "workflows" / f"{name}.json").read_text()])
    page.wait_for_function("count => window.app.graph.nodes.length == count", arg=len(workflow["nodes"]))


def press_run(page) -> dict:
    """How it ended, with the results on the canvas."""
    page.evaluate(LISTEN)
    page.get_by_test_id("queue-button").click()
    ended = page.evaluate("() => window.ended")
    if ended["kind"] == "execution_success":
        page.wait_for_function(SHOWN)
    page.evaluate("() => window.app.graph.setDirtyCanvas(true, true)")  # else it shows sizes from before the previews
    page.wait_for_timeout(1000)
    return ended


def take_picture(page, path: Path) -> None:
    """Into ``path``, and into the folder that CVVAE_SCREENSHOTS names."""
    page.screenshot(path=path)
    if kept := os.environ.get("CVVAE_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)


def assert_saved(server, ended: dict, workflow: dict, *types: str) -> None:
    """Every node of these types saved files, none of them empty."""
    saved = server.saved(ended["prompt_id"])
    wanted = {str(node["id"]) for node in workflow["nodes"] if node["type"] in types}
    assert wanted <= set(saved) and all(path.stat().st_size for paths in saved.values() for path in paths)
