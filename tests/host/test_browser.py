"""What a user does and sees: workflow files dropped and run, nodes searched, help read, runs cancelled, mistakes explained.

A real server and a real browser, opened once for all tests here.  Pictures of what was seen are kept in the folder that
CVVAE_SCREENSHOTS names, else among pytest's temporary files.
"""

import pytest
from comfy_host import REPOSITORY
from web_interface import KEPT, LAY_OUT, MARKED, NOT_THERE, OPTIONS, READY, STATE, TITLE, UNKNOWN, start_browser

FOLDER = REPOSITORY / "workflows"
# Run, cut short, by tests of their own.
LONG = ("cv-vae_finetune", "cv-vae_adapt_svd", "cv-vae_svd_adapted")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem not in LONG)
HELP = REPOSITORY / "web" / "docs"
SAVES = ("SaveImage", "SaveVideo", "PreviewImage", "SaveAnimatedWEBP", "SaveLatent")
# What takes the place of checkpoints that have to be downloaded, where it is there, and pictures that a CPU can sample.
STAND_INS = (("CheckpointLoaderSimple", "ckpt_name", "narrow_sd15.safetensors"),
             ("ImageOnlyCheckpointLoader", "ckpt_name", "narrow_svd.safetensors"),
             ("CVVAELoader", "vae_name", "tiny (built in)"), ("KSampler", "steps", 2),
             ("EmptyLatentImage", "width", 128), ("EmptyLatentImage", "height", 64),
             ("SVD_img2vid_Conditioning", "width", 128), ("SVD_img2vid_Conditioning", "height", 64),
             ("CVVAEAdapt", "steps", 4), ("CVVAEAdapt", "learning_rate", 1e-2), ("CVVAEAdapt", "latents", 5),
             ("CVVAEAdapt", "width", 64), ("CVVAEAdapt", "height", 64))
# The server's own tests run the whole length.
SHORTER = (("RepeatImageBatch", "amount", 1), ("CVVAEFrameCalculator", "amount", 5))
AT_ONCE = 2.0  # seconds from Cancel to the end of the run

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("host", ["newest"], indirect=True)]


@pytest.fixture(scope="module")
def ui(server, tmp_path_factory):
    yield from start_browser(server, tmp_path_factory.mktemp("screenshots"))


def drop(ui, name: str) -> None:
    ui.drop(name, (FOLDER / f"{name}.json").read_text())
    assert ui.page.evaluate(UNKNOWN) == []


# -- workflows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_drop_and_run(ui, server, workflows, name):
    drop(ui, name)
    for setting in SHORTER:
        ui.set(*setting)
    if missing := ui.page.evaluate(NOT_THERE):
        ui.picture(f"{name}_before_download")
        for stand_in in STAND_INS:
            ui.set(*stand_in)
    if ui.page.evaluate(NOT_THERE):
        pytest.skip(f"dropped without a missing node, not run: needs {', '.join(map(str, missing))}")
    ended = ui.run()
    ui.picture(name)
    assert ended["kind"] == "execution_success", ended
    assert_saved(server, ended, workflows[name])


def test_cancel_a_finetune_and_go_on(ui, server, workflows):
    name = "cv-vae_finetune"
    drop(ui, name)
    ui.set("CVVAEFinetune", "run", "in_the_browser")
    ui.set("CVVAEEvaluate", "frames", 5)
    run = server.base / "output" / "cv-vae" / "in_the_browser"
    ended, _ = ui.cancel_when_started("CVVAEFinetune")
    assert ended["kind"] == "execution_interrupted", ended
    taken = int(max((run / "checkpoints").iterdir()).stem.removeprefix("step_"))
    assert taken >= 1 and not (run / "model.safetensors").exists()

    ui.set("CVVAEFinetune", "steps", taken + 1)
    ended = ui.run()
    ui.picture(name)
    assert ended["kind"] == "execution_success", ended
    assert_saved(server, ended, workflows[name])
    assert len((run / "losses.csv").read_text().splitlines()) == 1 + taken + 1
    assert f"at step {taken}." in server.log.read_text()


def test_adapt_svd_and_sample_with_it(ui, server, workflows, svd_clips):
    for name in ("cv-vae_adapt_svd", "cv-vae_svd_adapted"):
        drop(ui, name)
        for setting in (*SHORTER, *STAND_INS):
            ui.set(*setting)
        ui.page.keyboard.press("r")  # the second names the file that the first has made
        ui.page.wait_for_function(f"() => !({NOT_THERE})().length")
        ended = ui.run()
        ui.picture(name)
        assert ended["kind"] == "execution_success", ended
        assert_saved(server, ended, workflows[name])


def assert_saved(server, ended: dict, workflow: dict) -> None:
    """Every node that saves has saved files, none of them empty."""
    saved = server.saved(ended["prompt_id"])
    wanted = {str(node["id"]) for node in workflow["nodes"] if node["type"] in SAVES}
    assert wanted <= set(saved) and all(path.stat().st_size for paths in saved.values() for path in paths)


# -- the interface -----------------------------------------------------------------------------------


def test_nodes_as_they_come(ui, server):
    """Nothing to assert but that each can be made: for looking at."""
    types = [name for name in server.get("/object_info") if name.startswith("CVVAE")]
    ui.page.evaluate(LAY_OUT, types)
    ui.picture("all_nodes")
    assert ui.page.evaluate(UNKNOWN) == [] and len(ui.page.evaluate(STATE)["nodes"]) == len(types)


def test_nodes_are_found_and_added_by_search(ui, server):
    info = server.get("/object_info")
    names = {info[node]["display_name"] for node in info if node.startswith("CVVAE")}
    assert names <= set(ui.search("cvvae"))
    ui.picture("search", fit=False)
    aliases = {"cv-vae decode": "CV-VAE Decode", "load cv-vae": "Load CV-VAE", "slerp": "CV-VAE Interpolate Latents",
               "ping-pong": "CV-VAE Trim, Reverse, Loop Latents", "adain": "CV-VAE Match Latent Statistics"}
    for words, name in aliases.items():
        assert name in ui.search(words)[:2], words
    before = len(ui.page.evaluate(STATE)["nodes"])
    ui.page.keyboard.press("Enter")
    ui.page.locator("canvas#graph-canvas").click(position={"x": 700, "y": 300})
    ui.page.wait_for_function("count => window.app.graph.nodes.length == count", arg=before + 1)
    assert ui.page.evaluate(STATE)["nodes"][-1]["type"] == "CVVAENormalizeLatents"


def test_latents_are_seen_without_decoding(ui):
    ui.load("preview", {
        "101": {"class_type": "CVVAEExample", "inputs": {"media": "flower clip (33 frames)"}},
        "102": {"class_type": "CVVAELoader", "inputs": {}},
        "103": {"class_type": "CVVAEEncode", "inputs": {"pixels": ["101", 0], "vae": ["102", 0]}},
        "104": {"class_type": "CVVAEPreviewLatents", "inputs": {"samples": ["103", 0]}},
    })
    ended = ui.run()
    ui.picture("preview")
    assert ended["kind"] == "execution_success", ended
    assert ui.page.evaluate("() => window.app.graph.getNodeById(104).imgs.map(image => image.naturalWidth)") == [208] * 9


def test_a_decode_is_cancelled_at_once_and_the_next_one_runs(ui, server):
    ui.load("cancelled", {
        "201": {"class_type": "CVVAEEmptyLatents", "inputs": {"width": 192, "height": 192, "frames": 289}},
        "202": {"class_type": "CVVAELoader", "inputs": {}},
        "203": {"class_type": "CVVAEDecode", "inputs": {"samples": ["201", 0], "vae": ["202", 0]}},
        "204": {"class_type": "PreviewImage", "inputs": {"images": ["203", 0]}},
    })
    ended, seconds = ui.cancel_when_started("CVVAEDecode")
    ui.picture("cancelled")
    assert ended["kind"] == "execution_interrupted" and ended["node_type"] == "CVVAEDecode", ended
    assert seconds < AT_ONCE
    ui.set("CVVAEEmptyLatents", "frames", 5)
    ended = ui.run()
    ui.picture("after_cancel")
    assert ended["kind"] == "execution_success", ended
    assert [len(paths) for paths in server.saved(ended["prompt_id"]).values()] == [5]


def test_a_workflow_survives_a_reload(ui):
    drop(ui, "cv-vae_video_round_trip")
    ui.set("SaveVideo", "filename_prefix", "cv-vae/kept_over_a_reload")
    x, y = ui.page.evaluate(TITLE, "CVVAELoader")
    ui.page.mouse.move(x, y)
    ui.page.mouse.down()
    ui.page.mouse.move(x + 30, y + 200, steps=4)
    ui.page.mouse.up()
    before = ui.page.evaluate(STATE)
    ui.page.wait_for_function(KEPT, arg="kept_over_a_reload")
    ui.page.reload()
    ui.page.wait_for_function(READY)
    ui.wait_for_nodes([node["type"] for node in before["nodes"]])
    ui.picture("reloaded")
    assert ui.page.evaluate(STATE) == before


def test_a_wrong_file_is_an_error_on_the_node(ui, server):
    page = server.base / "models" / "vae" / "sign_in.safetensors"
    page.write_text("<!DOCTYPE html><html><body>Please sign in</body></html>")
    try:
        drop(ui, "cv-vae_image_round_trip")
        ui.page.keyboard.press("r")  # read the lists of files again
        ui.page.wait_for_function(f"arg => ({OPTIONS})(arg).some(name => name.includes('sign_in'))",
                                  arg=["CVVAELoader", "vae_name"])
        [choice] = [name for name in ui.page.evaluate(OPTIONS, ["CVVAELoader", "vae_name"]) if "sign_in" in name]
        ui.set("CVVAELoader", "vae_name", choice)
        ui.press_run()
        message = ui.error_of("CVVAELoader")
        ui.picture("wrong_file")
        assert "sign_in.safetensors" in message and "web page" in message, message
        assert ui.page.evaluate(MARKED, "CVVAELoader")
    finally:
        page.unlink()


@pytest.mark.parametrize("node", ["CVVAELoader"])
def test_help_is_shown_beside_a_node(ui, node):
    if not (HELP / f"{node}.md").exists():
        pytest.skip(f"there is no page web/docs/{node}.md yet")
    drop(ui, "cv-vae_image_round_trip")
    ui.picture("before_help")
    ui.page.mouse.click(*ui.page.evaluate(TITLE, node))
    ui.page.get_by_test_id("info-button").click()
    heading = next(line.strip("# ") for line in (HELP / f"{node}.md").read_text().splitlines() if line.startswith("#"))
    ui.page.get_by_role("heading", name=heading).first.wait_for()
    ui.picture("help", fit=False)
