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
# A video's node grows when its preview is there.
SHOWN = """() => window.app.graph.nodes.every(node => {
    const video = node.videoContainer?.querySelector("video");
    if (node.type == "SaveImage") return node.imgs?.every(image => image.complete);
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
    page.goto(server.url)
    page.wait_for_function("() => window.app?.graph && window.app.vueAppReady !== false")
    page.wait_for_timeout(1000)

    page.evaluate(DROP, [f"{name}.json", (REPOSITORY / "workflows" / f"{name}.json").read_text()])
    page.wait_for_function("count => window.app.graph.nodes.length == count", arg=len(workflows[name]["nodes"]))
    page.evaluate(LISTEN)
    page.get_by_test_id("queue-button").click()
    ended = page.evaluate("() => window.ended")
    if ended["kind"] == "execution_success":
        page.wait_for_function(SHOWN)
    page.evaluate("() => window.app.graph.setDirtyCanvas(true, true)")  # else it shows sizes from before the previews
    page.wait_for_timeout(1000)

    screenshot = tmp_path / f"{name}.png"
    page.screenshot(path=screenshot)
    if kept := os.environ.get("CVVAE_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copy(screenshot, kept)
    assert ended["kind"] == "execution_success", ended
    saved = server.saved(ended["prompt_id"])
    wanted = {str(node["id"]) for node in workflows[name]["nodes"] if node["type"] in ("SaveImage", "SaveVideo")}
    assert wanted <= set(saved) and all(path.stat().st_size for paths in saved.values() for path in paths)
