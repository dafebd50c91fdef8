"""ComfyUI started for real: what it says about the nodes, and the workflows run through its queue."""

import copy
import shutil
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest
from comfy_host import REPOSITORY
from drawn import write_video
from PIL import Image
from safetensors.numpy import load_file

from cvvae.checkpoint import BUILT_IN
from cvvae.download import PUBLISHED

pytestmark = pytest.mark.slow

MEDIA = REPOSITORY / "workflows" / "media"
ENOUGH = 20  # dB; the built-in model reaches 24 to 28, random weights about 10

NODES = {
    "CVVAELoader": (["vae_name", "batch_is", "dtype"], ["VAE"]),
    "CVVAEDownload": (["weights"], ["COMBO"]),
    "CVVAEEncode": (["pixels", "vae", "mode", "layout", "window", "tile", "overlap", "memory", "pieces"], ["LATENT"]),
    "CVVAEDecode": (["samples", "vae", "mode", "frames", "window", "tile", "overlap", "memory", "pieces", "fps"],
                    ["IMAGE", "VIDEO"]),
    "CVVAEExample": (["media"], ["IMAGE", "FLOAT", "VIDEO"]),
    "CVVAESave": (["vae", "name", "dtype", "description"], []),
}
TRAINING_NODES = {
    "CVVAEInflate": (["teacher", "image_vae"], ["VAE"]),
    "CVVAEFinetune": (["folder", "preset", "steps", "learning_rate", "teacher", "run", "resume", "seed", "images",
                       "image_vae", "cv_vae"], ["VAE", "LOSS_MAP", "STRING", "IMAGE"]),
    "CVVAELossPlot": (["run"], ["IMAGE"]),
    "CVVAEEvaluate": (["vae", "images", "teacher", "frames", "title", "image_vae"], ["STRING", "IMAGE"]),
}
LATENT_NODES = {
    "CVVAEInterpolateLatents": (["keyframes", "frames", "positions", "curve", "easing", "loop", "batch_is"],
                                ["LATENT", "INT"]),
    "CVVAETrimLatents": (["samples", "start", "frames", "play", "fade", "repeat", "vae"], ["LATENT", "INT"]),
    "CVVAEResampleLatents": (["samples", "speed", "frames", "curve", "vae"], ["LATENT", "INT"]),
    "CVVAEJoinLatents": (["clips", "overlap", "curve", "easing", "vae"], ["LATENT", "INT"]),
    "CVVAEInsertLatents": (["samples", "inserted", "frame", "action", "vae"], ["LATENT", "INT"]),
    "CVVAELatentLayout": (["samples", "layout", "clips"], ["LATENT", "INT"]),
    "CVVAELatentStatistics": (["samples"], ["STRING", "IMAGE"]),
    "CVVAENormalizeLatents": (["samples", "over", "strength", "reference"], ["LATENT"]),
    "CVVAEPreviewLatents": (["samples", "model", "show", "scale", "vae"], ["IMAGE"]),
    "CVVAEEmptyLatents": (["width", "height", "frames", "channels", "layout"], ["LATENT", "INT"]),
    "CVVAEFrameCalculator": (["start_from", "amount", "fps", "batch_is"], ["INT", "INT", "FLOAT", "INT", "FLOAT"]),
}
CATEGORIES = {"CV-VAE": NODES, "CV-VAE/training": TRAINING_NODES, "CV-VAE/latent": LATENT_NODES}
PIECES = {"window": 17, "tile": 576, "overlap": 128}
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN", "COMFY_DYNAMICCOMBO_V3")


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def rate_of(path) -> Fraction:
    with av.open(str(path)) as file:
        return file.streams.video[0].average_rate


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def api_form(workflow: dict, object_info: dict) -> dict:
    """A workflow as the queue takes it: what the front end does when Run is pressed, for plain widgets."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info:  # notes
            continue
        linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        values = {name: value for name, _, value in widgets(node, object_info) if value is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values | linked}
    return prompt


def widgets(node: dict, object_info: dict) -> list[tuple[str, list, object]]:
    """Name, definition and value of each widget; None where the file has none.  A linked widget keeps its value there."""
    values = iter(node.get("widgets_values", []))
    found = []
    for kind in ("required", "optional"):
        for name, spec in object_info[node["type"]]["input"].get(kind, {}).items():
            if isinstance(spec[0], list) or spec[0] in WIDGETS:
                found.append((name, spec, next(values, None)))
                if len(spec) > 1 and spec[1].get("control_after_generate"):
                    next(values, None)
    assert list(values) == [], f"{node['type']} {node['id']} has values for widgets it does not have"
    return found


def with_values(workflow: dict, **values: dict) -> dict:
    """A copy in which every node of a type has other values: {type: {place among the values: value}}."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        for place, value in values.get(node["type"], {}).items():
            node["widgets_values"][place] = value
    return workflow


def saved_by(files: dict, workflow: dict, title: str):
    """The one file saved by the node with this title."""
    node = next(node for node in workflow["nodes"] if node.get("title") == title)
    [path] = files[str(node["id"])]
    return path


@pytest.mark.parametrize("category, node_id", [(category, name) for category, nodes in CATEGORIES.items() for name in nodes])
def test_object_info(server, category, node_id):
    info = server.get(f"/object_info/{node_id}")[node_id]
    inputs, outputs = CATEGORIES[category][node_id]
    assert [name for kind in ("required", "optional") for name in info["input_order"].get(kind, [])] == inputs
    assert info["output"] == outputs
    assert info["category"] == category
    assert "CV-VAE" in info["display_name"] and info["description"]
    for kind in ("required", "optional"):
        for name, spec in info["input"].get(kind, {}).items():
            assert spec[1]["tooltip"], f"{name} has no tooltip"


def test_the_loader_lists_files_and_the_built_in_model(server):
    (server.base / "models" / "vae" / "mine.safetensors").touch()
    spec = server.get("/object_info/CVVAELoader")["CVVAELoader"]["input"]["required"]["vae_name"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    assert options[0] == "tiny (built in)" and "mine.safetensors (damaged)" in options


def test_a_file_that_was_downloaded_before_goes_on_to_the_loader(server):
    """No connection is opened; what the download gives, Load CV-VAE takes."""
    shutil.copy(BUILT_IN / "tiny.safetensors", server.base / "models" / "vae" / PUBLISHED["vae3d"].file)
    settings = {"batch_is": "video clip", "dtype": "auto"}
    prompt = {"1": {"class_type": "CVVAEDownload", "inputs": {"weights": "vae3d"}},
              "2": {"class_type": "CVVAELoader", "inputs": {"vae_name": ["1", 0]} | settings},
              "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
              "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["2", 0]}},
              "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "downloaded"}}}
    assert frames_of(server.run(prompt)["5"][0]).shape == (1, 32, 32, 3)


def test_workflows_are_offered_as_templates(server, workflows):
    assert set(server.get("/api/workflow_templates")[server.pack]) == set(workflows)


def test_image_round_trip(server, workflows):
    workflow = workflows["cv-vae_image_round_trip"]
    files = server.run(api_form(workflow, server.get("/object_info")))
    result = frames_of(saved_by(files, workflow, "Picture that came back"))
    assert psnr(result, frames_of(MEDIA / "cat.jpg")) > ENOUGH


def test_video_round_trip(server, workflows):
    workflow = workflows["cv-vae_video_round_trip"]
    files = server.run(api_form(workflow, server.get("/object_info")))
    source = frames_of(MEDIA / "flower.mp4")
    path = saved_by(files, workflow, "Clip that came back")
    result = frames_of(path)
    assert len(result) == len(source) == 33 and rate_of(path) == rate_of(MEDIA / "flower.mp4")
    assert psnr(result, source) > ENOUGH
    both = frames_of(saved_by(files, workflow, "Source and clip side by side"))
    assert both.shape == (33, 160, 424, 3)
    assert psnr(both[:, :, :208], source) > 30 and psnr(both[:, :, -208:], source) > ENOUGH


def test_a_video_keeps_its_speed_and_its_sound(server):
    """VIDEO sockets all the way: Load Video, encode, decode, Save Video."""
    write_video(server.base / "input" / "film.mp4", 10, 48, 64, Fraction(24000, 1001), sound=True)
    run = {"1": ("LoadVideo", {"file": "film.mp4"}),
           "2": ("CVVAELoader", {"vae_name": "tiny (built in)", "batch_is": "video clip", "dtype": "fp32"}),
           "3": ("CVVAEEncode", {"pixels": ["1", 0], "vae": ["2", 0], "mode": "as loaded", **PIECES,
                                 "layout": "frames as batch"}),
           "4": ("CVVAEDecode", {"samples": ["3", 0], "vae": ["2", 0], "mode": "auto", "frames": 0, **PIECES}),
           "5": ("SaveVideo", {"video": ["4", 1], "filename_prefix": "film", "format": "auto", "codec": "auto"})}
    [path] = server.run({key: {"class_type": node, "inputs": inputs} for key, (node, inputs) in run.items()})["5"]
    with av.open(str(path)) as file:
        assert file.streams.audio
    assert rate_of(path) == Fraction(2997, 125) and frames_of(path).shape == (10, 48, 64, 3)


def test_finetune(server, workflows):
    """The graph in two steps: what it saves is a CV-VAE that the loader lists."""
    workflow = shortened(workflows["cv-vae_finetune"])
    files = server.run(api_form(workflow, server.get("/object_info")))
    assert frames_of(saved_by(files, workflow, "Pictures after")).shape[1:] > (100, 500)
    assert frames_of(saved_by(files, workflow, "Losses, and scores of the held-out clip")).shape == (1, 1040, 900, 3)
    run = server.base / "output" / "cv-vae" / "shortened"
    assert (run / "checkpoints" / "step_00000002.pt").exists()
    assert len((run / "validation.csv").read_text().splitlines()) == 4  # a heading, before, in between and after
    options = server.get("/object_info/CVVAELoader")["CVVAELoader"]["input"]["required"]["vae_name"]
    assert "finetuned.safetensors" in (options[0] if isinstance(options[0], list) else options[1]["options"])


def shortened(workflow: dict) -> dict:
    """A finetune of two steps in a run of its own, measured on five frames."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "CVVAEFinetune":
            node["widgets_values"][2] = 2
            node["widgets_values"][5] = "shortened"
        if node["type"] == "CVVAEEvaluate":
            node["widgets_values"][1] = 5
    return workflow


# -- workflows, as they are in the file ----------------------------------------------------------------


def test_every_node_and_value_is_known(server, workflows):
    """On the oldest host, too; a file that has to be downloaded is named in the node's properties, or made by a workflow."""
    info = server.get("/object_info")
    made = [f"cv-vae/{node['widgets_values'][4]}.safetensors" for workflow in workflows.values()
            for node in workflow["nodes"] if node["type"] == "CVVAEAdapt"]
    for name, workflow in workflows.items():
        for node in workflow["nodes"]:
            if node["type"] == "Note":
                continue
            assert node["type"] in info, f"{name}: this ComfyUI has no {node['type']}"
            to_download = [model["name"] for model in node["properties"].get("models", [])]
            for widget, spec, value in widgets(node, info):
                if value is not None and value not in to_download + made:
                    assert fits(spec, value), f"{name}: {node['type']} {node['id']} cannot set {widget} to {value!r}"


def fits(spec: list, value) -> bool:
    kind, settings = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        return value in kind
    if kind == "COMBO":
        return value in settings["options"]
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return value in [option["key"] for option in settings["options"]]
    if kind in ("INT", "FLOAT"):
        whole = kind == "FLOAT" or isinstance(value, int)
        return whole and settings.get("min", value) <= value <= settings.get("max", value)
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


def run_file(server, workflow: dict) -> Callable[[str], np.ndarray]:
    """Run it; the frames that the node of a title saved."""
    files = server.run(api_form(workflow, server.get("/object_info")))
    return lambda title: frames_of(saved_by(files, workflow, title))


def test_long_video(server, workflows):
    clip = run_file(server, workflows["cv-vae_long_video"])("Long clip that came back")
    assert psnr(clip, np.tile(frames_of(MEDIA / "flower.mp4"), (3, 1, 1, 1))) > ENOUGH


def test_interpolate_two_pictures(server, workflows):
    clip = run_file(server, workflows["cv-vae_interpolate_two_pictures"])("From picture to picture")
    cat = Image.open(MEDIA / "cat.jpg").crop((32, 0, 416, 296)).resize((208, 160), Image.Resampling.LANCZOS)
    flower = frames_of(MEDIA / "flower.mp4")[-1]
    assert len(clip) == 33
    assert psnr(clip[0], np.asarray(cat)) > ENOUGH and psnr(clip[-1], flower) > ENOUGH
    assert psnr(clip[16], flower) < psnr(clip[24], flower) < psnr(clip[-1], flower)


def test_keyframe_loop(server, workflows):
    clip = run_file(server, workflows["cv-vae_keyframe_loop"])("Loop")
    flower = frames_of(MEDIA / "flower.mp4")[-1]
    assert len(clip) == 64 and psnr(clip[0], flower) > ENOUGH
    assert psnr(clip[63], flower) > psnr(clip[60], flower) > psnr(clip[48], flower)  # it comes back
    assert all(psnr(clip[a], clip[b]) < 15 for a, b in ((0, 16), (16, 32), (32, 48)))  # four pictures


def test_cross_fade(server, workflows):
    clip = run_file(server, workflows["cv-vae_cross_fade"])("Bee, then goats")
    bee, goats = frames_of(MEDIA / "bee.mp4"), frames_of(MEDIA / "goats.mp4")
    assert len(clip) == 53
    assert psnr(clip[:13], bee[:13]) > ENOUGH and psnr(clip[-13:], goats[-13:]) > ENOUGH
    assert psnr(clip[26], (bee[26].astype(float) + goats[6]) / 2) > 15  # in the middle, something of both


def test_image_and_video_mode(server, workflows):
    shown = run_file(server, workflows["cv-vae_image_and_video_mode"])
    pictures, clip = shown("Image mode: 1 frame for a latent"), shown("Video mode: 4 frames for a latent")
    source = frames_of(MEDIA / "flower.mp4")
    assert len(pictures) == 9 and psnr(clip, source) > ENOUGH
    assert all(max(psnr(pictures[k], source[frame]) for frame in range(max(0, 4 * k - 3), 4 * k + 1)) > ENOUGH
               for k in range(9))


# The next ones need checkpoints.  Narrow ones of the pack in stand_ins take their place, and pictures a CPU can sample.
NARROW = {"CheckpointLoaderSimple": {0: "narrow_sd15.safetensors"}, "CVVAELoader": {0: "tiny (built in)"},
          "ImageOnlyCheckpointLoader": {0: "narrow_svd.safetensors"}, "KSampler": {2: 2}, "EmptyLatentImage": {0: 96, 1: 64},
          "SVD_img2vid_Conditioning": {0: 96, 1: 64},
          "CVVAEAdapt": {2: 4, 3: 1e-2, 6: 5, 7: 64, 8: 64}}  # steps, learning rate, latents, width, height


def test_sd_text_to_image(server, workflows):
    workflow = with_values(workflows["cv-vae_sd_text_to_image"], **NARROW)
    files = server.run(api_form(workflow, server.get("/object_info")))
    nodes = {node.get("title"): str(node["id"]) for node in workflow["nodes"]}
    for title in ("Pictures", "To compare"):
        pictures = [frames_of(path)[0] for path in files[nodes[title]]]
        assert [picture.shape for picture in pictures] == [(64, 96, 3)] * 2
        assert not np.array_equal(*pictures)


@pytest.mark.parametrize("latents, frames", [(25, 97), (14, 53)])
def test_svd_image_to_video(server, workflows, latents, frames):
    workflow = with_values(workflows["cv-vae_svd_image_to_video"], **NARROW, CVVAEFrameCalculator={1: latents})
    files = server.run(api_form(workflow, server.get("/object_info")))
    path = saved_by(files, workflow, "97 frames")
    clip = frames_of(path)
    assert clip.shape == (frames, 64, 96, 3) and clip.std() > 5
    assert rate_of(path) == 24


def test_animatediff_batch(server, workflows):
    """The batch that AnimateDiff's modules would join; both decoders take as long to play."""
    workflow = with_values(workflows["cv-vae_animatediff_batch"], **NARROW)
    files = server.run(api_form(workflow, server.get("/object_info")))
    for title, frames, rate in (("61 frames", 61, 32), ("16 frames", 16, 8)):
        path = saved_by(files, workflow, title)
        clip = frames_of(path)
        assert clip.shape == (frames, 64, 96, 3) and clip.std() > 5
        assert rate_of(path) == rate


@pytest.fixture(scope="module")
def adapted(server, workflows, svd_clips) -> tuple[dict, dict]:
    """The workflow that makes an adapter, cut short, and the files its nodes saved."""
    workflow = with_values(workflows["cv-vae_adapt_svd"], **NARROW)
    return workflow, server.run(api_form(workflow, server.get("/object_info")))


def test_adapt_svd(server, adapted):
    workflow, files = adapted
    assert frames_of(saved_by(files, workflow, "Losses, and those of held-out clips")).std() > 10
    run = server.base / "output" / "cv-vae" / "svd_xt_adapted"
    assert len((run / "losses.csv").read_text().splitlines()) == 1 + 4
    assert len((run / "latents" / "manifest.csv").read_text().splitlines()) == 1 + 4
    made = load_file(run / "adapter.safetensors")
    assert set(made) == {"diffusion_model.out.2.diff", "diffusion_model.out.2.diff_b"}
    assert all(np.abs(difference).max() > 1e-3 for difference in made.values())


def test_svd_adapted(server, workflows, adapted):
    """With the adapter that was just made, by its name in the file; at strength 0 to the last bit as without."""
    workflow = with_values(workflows["cv-vae_svd_adapted"], **NARROW, CVVAEFrameCalculator={1: 14})
    prompt = api_form(workflow, server.get("/object_info"))
    nodes = {node.get("title"): str(node["id"]) for node in workflow["nodes"]}
    for name in ("adapted", "as published"):
        prompt[name] = {"class_type": "SaveLatent", "inputs": {"samples": [nodes[f"Sample, {name}"], 0],
                                                               "filename_prefix": f"latents {name}"}}
    files = server.run(prompt)
    for title in ("Adapted", "As published"):
        path = saved_by(files, workflow, title)
        assert frames_of(path).shape == (53, 64, 96, 3) and rate_of(path) == 24
    prompt[nodes["Adapter"]]["inputs"]["strength_model"] = 0
    server.run({key: node for key, node in prompt.items() if node["class_type"] != "SaveVideo"})
    published, at_1, at_0 = (load_file(server.base / "output" / f"latents {name}_.latent")["latent_tensor"]
                             for name in ("as published_00001", "adapted_00001", "adapted_00002"))
    assert published.shape == (14, 4, 8, 12)
    assert np.array_equal(at_0, published) and not np.array_equal(at_1, published)


def test_a_wrong_value_is_refused_before_running(server):
    prompt = {"1": {"class_type": "CVVAELoader", "inputs": {"vae_name": "gone.safetensors", "batch_is": "video clip",
                                                            "dtype": "auto"}},
              "2": {"class_type": "VAESave", "inputs": {"vae": ["1", 0], "filename_prefix": "x"}}}
    with pytest.raises(AssertionError, match="gone.safetensors"):
        server.run(prompt)
