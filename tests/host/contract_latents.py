"""What the latent nodes must do in a host; run and read as contract.py, whose machinery this is.

    cd COMFYUI; python contract_latents.py PACK BASE_DIRECTORY [check ...]
"""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

spec = importlib.util.spec_from_file_location("contract_machinery", Path(__file__).with_name("contract.py"))
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
CHECKS, host, check, clip, close, load, raises, run, shape = (
    getattr(contract, name) for name in "CHECKS host check clip close load raises run shape".split())
CHECKS.clear()  # contract.py's own run by itself

FORWARD, BACKWARD, THERE_AND_BACK, SEAMLESS = "forward", "backward", "there and back (loop)", "end fades into start (loop)"
BATCH, CLIP, IMAGES = "frames as batch", "clip with time axis", "independent images"


def tools():
    return importlib.import_module(f"{host.cvvae.__name__}.latents")


def latents(t, seed=0, five=False, **extra):
    """[t, 4, 6, 8], or [1, 4, t, 6, 8]."""
    samples = host.torch.randn(t, 4, 6, 8, generator=host.torch.Generator().manual_seed(seed))
    return {"samples": as_clips(samples) if five else samples} | extra


def as_clips(batch):
    return batch.movedim(0, 1)[None].contiguous()


def numbers(tensor):
    return tensor.flatten(1)[:, 0].tolist()


def mask_of(t):
    """A mask of another value in each latent."""
    return (host.torch.arange(t).float() / 16).view(-1, 1, 1, 1).expand(-1, 1, 48, 64).contiguous()


def interpolated(*keyframes, **inputs):
    return run("CVVAEInterpolateLatents", keyframes={f"keyframe{k}": key for k, key in enumerate(keyframes)}, **inputs)


def joined(*clips, **inputs):
    return run("CVVAEJoinLatents", clips={f"clip{k}": clip for k, clip in enumerate(clips)}, **inputs)


def single_clip_nodes(vae):
    """Every node that turns latents into latents, as a function of one."""
    other = latents(2, seed=9)
    return {
        "interpolate": lambda x: interpolated(x, other, frames=33),
        "trim": lambda x: run("CVVAETrimLatents", samples=x, start=4, frames=9),
        "backward": lambda x: run("CVVAETrimLatents", samples=x, play=BACKWARD, vae=vae),
        "there and back": lambda x: run("CVVAETrimLatents", samples=x, play=THERE_AND_BACK),
        "seamless": lambda x: run("CVVAETrimLatents", samples=x, play=SEAMLESS, fade=4),
        "resample": lambda x: run("CVVAEResampleLatents", samples=x, speed=0.5),
        "join": lambda x: joined(x, other),
        "insert": lambda x: run("CVVAEInsertLatents", samples=x, inserted=other, frame=5, action="insert"),
        "replace": lambda x: run("CVVAEInsertLatents", samples=x, inserted=other, frame=5, vae=vae),
        "layout": lambda x: run("CVVAELatentLayout", samples=x, layout=CLIP if x["samples"].ndim == 5 else BATCH),
        "normalize": lambda x: run("CVVAENormalizeLatents", samples=x, reference=other),
    }


# -- all of them -------------------------------------------------------------------------------------


@check
def every_input_says_when_to_change_it():
    found = [node for node_id, node in host.nodes.NODE_CLASS_MAPPINGS.items() if node_id.startswith("CVVAE")]
    found = [schema for schema in (node.GET_SCHEMA() for node in found) if schema.category == "CV-VAE/latent"]
    assert len(found) >= 9, [schema.node_id for schema in found]
    for schema in found:
        assert schema.description and schema.search_aliases and schema.display_name.startswith("CV-VAE"), schema.node_id
        for socket in [part for widget in schema.inputs for part in widget.get_all()]:
            assert socket.tooltip, f"{schema.node_id}.{socket.id}"


@check
def both_layouts_give_the_same_numbers():
    for name, node in single_clip_nodes(load()).items():
        batch = node(latents(5))[0]["samples"]
        five = node(latents(5, five=True))[0]["samples"]
        assert batch.ndim == 4 and five.ndim == 5, name
        close(as_clips(batch), five, 1e-6)


@check
def inputs_are_not_written_into_and_other_keys_go_along():
    torch = host.torch
    for name, node in single_clip_nodes(load()).items():
        given = latents(5, noise_mask=mask_of(5), batch_index=[3, 1, 4, 1, 5], downscale_ratio_spacial=8,
                        cv_vae={"mode": "video", "frames": 17, "height": 48, "width": 64})
        before = {key: value.clone() if torch.is_tensor(value) else value.copy() if hasattr(value, "copy") else value
                  for key, value in given.items()}
        out = node(given)[0]
        assert given.keys() == before.keys() and out is not given, name
        for key, value in before.items():
            same = torch.equal(given[key], value) if torch.is_tensor(value) else given[key] == value
            assert same, f"{name} changed {key}"
        assert out["downscale_ratio_spacial"] == 8 and out["cv_vae"]["width"] == 64, name
        assert len(out["noise_mask"]) == len(out["samples"]), f"{name}: {list(out['noise_mask'].shape)}"
        assert len(out.get("batch_index", out["samples"])) == len(out["samples"]), name


@check
def types_are_kept():
    torch = host.torch
    vae = load()
    for kind in (torch.float16, torch.bfloat16):
        for name, node in single_clip_nodes(vae).items():
            out = node({"samples": latents(5)["samples"].to(kind)})[0]["samples"]
            assert out.dtype == kind, f"{name}: {out.dtype}"
            assert out.isfinite().all(), name


@check
def batches_of_clips_are_each_treated_alike():
    torch = host.torch
    two = {"samples": torch.cat([latents(5, five=True)["samples"], latents(5, 1, five=True)["samples"]])}
    vae = load()
    for name, node in single_clip_nodes(vae).items():
        if name == "layout":
            continue
        whole = node(two)[0]["samples"]
        for k in range(2):
            close(whole[k:k + 1], node({"samples": two["samples"][k:k + 1]})[0]["samples"], 1e-5)


@check
def native_nodes_take_the_results():
    importlib.import_module("comfy_extras.nodes_post_processing")  # nodes_latent cannot be imported before it
    batch = importlib.import_module("comfy_extras.nodes_latent").LatentBatch

    vae = load()
    for node in single_clip_nodes(vae).values():
        out = node(latents(5, noise_mask=mask_of(5)))[0]
        images = run("VAEDecode", samples=out, vae=vae)[0]
        shape(images, 4 * len(out["samples"]) - 3, 48, 64, 3)
        shape(batch.execute(out, latents(2)).args[0]["samples"], len(out["samples"]) + 2, 4, 6, 8)
        one = run("LatentFromBatch", samples=out, batch_index=1, length=1)[0]
        shape(one["noise_mask"], 1, *out["noise_mask"].shape[1:])
        shape(run("CVVAEDecode", samples=out, vae=vae)[0], frames_told(out), 48, 64, 3)


def frames_told(latent):
    return latent.get("cv_vae", {}).get("frames", 4 * len(latent["samples"]) - 3)


@check
def what_is_no_video_latent_is_refused():
    torch = host.torch
    import comfy.nested_tensor

    node = single_clip_nodes(load())["trim"]
    raises("[t, C, h, w] or [B, C, t, h, w], found shape [4, 6, 8]", node, {"samples": torch.zeros(4, 6, 8)})
    nested = comfy.nested_tensor.NestedTensor([latents(2, five=True)["samples"], torch.zeros(1, 8, 5)])
    raises("Separate them", node, {"samples": nested})
    raises("keyframe 2 has 16 channels", interpolated, latents(1), {"samples": torch.zeros(1, 16, 6, 8)})
    raises("CV-VAE Latent Layout", joined, latents(2), {"samples": torch.zeros(2, 4, 3, 6, 8)})
    raises("another family", run, "CVVAETrimLatents", samples={"samples": torch.randn(5, 16, 6, 8)}, start=4, vae=load())
    raises("Connect one to 'vae', or nothing", run, "CVVAETrimLatents", samples=latents(5), start=4,
           vae=contract.stock_vae())


@check
def autogrow_works_through_the_queue():
    """Keyframes in any order of the prompt, through this host's own validation and executor."""
    import execution

    prompt = {
        "a": {"class_type": "CVVAEEmptyLatents", "inputs": {"width": 64, "height": 48, "frames": 1, "layout": BATCH,
                                                            "channels": "4 (SD 1.x, SD 2.x, SVD)"}},
        "b": {"class_type": "CVVAENormalizeLatents", "inputs": {"samples": ["a", 0], "over": "whole clip", "strength": 1.0}},
        "c": {"class_type": "CVVAEInterpolateLatents",
              "inputs": {"keyframes.keyframe2": ["b", 0], "keyframes.keyframe0": ["a", 0], "keyframes.keyframe1": ["a", 0],
                         "frames": 9, "positions": "", "curve": "lerp", "easing": "linear", "loop": False,
                         "batch_is": "auto"}},
        "d": {"class_type": "CVVAEJoinLatents", "inputs": {"clips.clip0": ["c", 0], "clips.clip1": ["c", 0], "overlap": 0,
                                                           "curve": "lerp", "easing": "linear"}},
        "e": {"class_type": "CVVAELatentStatistics", "inputs": {"samples": ["d", 0]}},
    }
    valid = asyncio.run(execution.validate_prompt("prompt", prompt, None))
    assert valid[0], valid
    messages, texts = [], {}
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *message: messages.append(message),
                             send_progress_text=lambda text, node_id, *_: texts.__setitem__(node_id, text))
    executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, {"lru": 0, "ram": 1.0, "ram_inactive": 1.0})
    with patch.dict(sys.modules, server=SimpleNamespace(PromptServer=SimpleNamespace(instance=server))):
        executor.execute(prompt, "prompt", {"client_id": "me"}, ["e"])
    assert executor.success, executor.status_messages
    assert texts["c"] == "9 frames in 3 latents\nkeyframes at 0, 4, 8\nneighbours alike: 0.00, 0.00", texts
    done = [data["output"] for event, data, _ in messages if event == "executed" and data["node"] == "e"]
    assert done and done[0]["images"], messages


# -- each --------------------------------------------------------------------------------------------


@check
def interpolate_equals_the_library():
    keys = [latents(1, seed=seed)["samples"] for seed in range(3)]
    five = [as_clips(key) for key in keys]
    for curve in tools().CURVES:
        for easing in tools().EASINGS:
            latent, frames = interpolated(*({"samples": key} for key in keys), frames=21, positions="0, 8; 20", curve=curve,
                                          easing=easing)
            close(as_clips(latent["samples"]), tools().interpolate(five, [0, 2, 5], 6, curve, easing), 0)
            assert frames == 21 and "cv_vae" not in latent
    latent, frames = interpolated(*({"samples": key} for key in keys), frames=20)
    close(as_clips(latent["samples"]), tools().interpolate(five, [0, 3, 5], 6), 0)
    assert frames == latent["cv_vae"]["frames"] == 20
    raises("2 positions", interpolated, latents(1), latents(1), latents(1), positions="0 4")
    raises("positions is '0, x'", interpolated, latents(1), latents(1), positions="0, x")
    raises("at least 4 frames", interpolated, latents(1), latents(1), positions="1, 3")
    raises("do not fit", interpolated, latents(1), latents(1), latents(1), frames=5)


@check
def a_loop_decodes_without_a_double_frame():
    vae = load()
    latent, frames = interpolated(latents(1), latents(1, 1), frames=16, loop=True)
    shape(latent["samples"], 5, 4, 6, 8)
    close(latent["samples"][4], latent["samples"][0], 0)
    assert frames == 16
    shape(run("CVVAEDecode", samples=latent, vae=vae)[0], 16, 48, 64, 3)
    for play in (THERE_AND_BACK, SEAMLESS):
        looped, frames = run("CVVAETrimLatents", samples=latents(5), play=play, fade=4, repeat=2)
        close(looped["samples"][-1], looped["samples"][0], 0)
        assert frames == 2 * (32 if play == THERE_AND_BACK else 16), frames
        shape(run("CVVAEDecode", samples=looped, vae=vae)[0], frames, 48, 64, 3)


@check
def pictures_of_a_batch_are_keyframes():
    pictures = latents(3)
    expected = interpolated(*({"samples": pictures["samples"][k:k + 1]} for k in range(3)), frames=17)[0]["samples"]
    close(interpolated(pictures, frames=17, batch_is="independent images")[0]["samples"], expected, 0)
    encoded = run("CVVAEEncode", pixels=clip(3), vae=load("independent images"))[0]
    latent, frames = interpolated(encoded, frames=17)
    close(latent["samples"][[0, 2, 4]], encoded["samples"], 0)
    assert frames == 17 and latent["cv_vae"] == {"mode": "video", "frames": 17, "height": 48, "width": 64}


@check
def masks_and_indices_move_with_their_latents():
    given = latents(5, noise_mask=mask_of(5), batch_index=[10, 11, 12, 13, 14])
    sixteenths = lambda latent: [value * 16 for value in numbers(latent["noise_mask"])]  # noqa: E731
    trimmed = run("CVVAETrimLatents", samples=given, start=8)[0]
    assert sixteenths(trimmed) == [2, 3, 4] and trimmed["batch_index"] == [12, 13, 14]
    back = run("CVVAETrimLatents", samples=given, play=BACKWARD, vae=load())[0]
    assert sixteenths(back) == [4, 3, 2, 1, 0] and back["batch_index"] == [14, 13, 12, 11, 10]
    both = joined(given, latents(3))[0]
    assert sixteenths(both) == [0, 1, 2, 3, 4, 16, 16] and both["batch_index"] == [10, 11, 12, 13, 14, 1, 2]
    exact = joined(given, latents(3), vae=load())[0]
    assert sixteenths(exact) == [0, 1, 2, 3, 4, 16, 16, 16]
    put = run("CVVAEInsertLatents", samples=latents(3), inserted=given, frame=1, action="insert")[0]
    assert sixteenths(put) == [16, 1, 2, 3, 4, 16, 16] and put["batch_index"] == [0, 11, 12, 13, 14, 1, 2]
    fade = joined(given, latents(5), overlap=8)[0]
    assert "batch_index" not in fade and sixteenths(fade) == [0, 1, 2, 3, 10, 16, 16, 16]
    constant = latents(5, noise_mask=mask_of(1) + 0.5)
    shape(run("CVVAETrimLatents", samples=constant, start=8)[0]["noise_mask"], 1, 1, 48, 64)
    shape(run("CVVAETrimLatents", samples=latents(5, five=True, noise_mask=mask_of(5)), start=8)[0]["noise_mask"],
          1, 1, 3, 48, 64)
    clips = latents(5, five=True, batch_index=[7])
    assert run("CVVAEResampleLatents", samples=clips, speed=2.0)[0]["batch_index"] == [7]


@check
def the_first_latent_of_a_cut_clip_is_encoded_as_one_frame():
    vae = load()
    given = run("CVVAEEncode", pixels=clip(33), vae=vae)[0]
    plain, frames = run("CVVAETrimLatents", samples=given, start=13, frames=10)
    close(plain["samples"], given["samples"][4:8], 0)
    assert frames == plain["cv_vae"]["frames"] == 10
    exact = run("CVVAETrimLatents", samples=given, start=13, frames=10, vae=vae)[0]
    close(exact["samples"][1:], given["samples"][5:8], 0)
    close(exact["samples"][:1], vae.encode(vae.decode(given["samples"])[16:])[:1])
    raises("clip has 33, numbered 0 to 32", run, "CVVAETrimLatents", samples=given, start=30, frames=9)


@check
def turning_around_through_frames():
    vae = load()
    given = run("CVVAEEncode", pixels=clip(16), vae=vae)[0]
    images = vae.decode(given["samples"])[:16]
    back, frames = run("CVVAETrimLatents", samples=given, play=BACKWARD, vae=vae)
    close(back["samples"], vae.encode(images.flip(0)))
    assert frames == 16
    there, frames = run("CVVAETrimLatents", samples=given, play=THERE_AND_BACK, vae=vae)
    assert frames == 30
    close(there["samples"][:4], given["samples"][:4], 0)
    close(there["samples"][4:], vae.encode(host.torch.cat([images, images[:-1].flip(0)])[12:])[1:])


@check
def joins_and_inserts_through_frames_keep_every_frame():
    vae = load()
    a, b = (run("CVVAEEncode", pixels=clip(n, seed=seed), vae=vae)[0] for n, seed in ((9, 0), (8, 1)))
    of_a, of_b = (vae.decode(x["samples"])[:n] for x, n in ((a, 9), (b, 8)))
    cat = host.torch.cat
    both, frames = joined(a, b, vae=vae)
    assert frames == 17
    close(both["samples"], cat([a["samples"], vae.encode(cat([of_a[8:], of_b]))[1:]]))
    put, frames = run("CVVAEInsertLatents", samples=a, inserted=b, frame=6, action="insert", vae=vae)
    assert frames == 17
    close(put["samples"], cat([a["samples"][:2], vae.encode(cat([of_a[4:6], of_b, of_a[6:]]))[1:]]))
    c = run("CVVAEEncode", pixels=clip(17, seed=2), vae=vae)[0]
    of_c = vae.decode(c["samples"])
    replaced, frames = run("CVVAEInsertLatents", samples=c, inserted=b, frame=2, vae=vae)
    assert frames == 17
    close(replaced["samples"], cat([c["samples"][:1], vae.encode(cat([of_c[:2], of_b, of_c[10:13]]))[1:],
                                    c["samples"][4:]]))
    raises("reach behind the end", run, "CVVAEInsertLatents", samples=a, inserted=c, frame=2, vae=vae)
    raises("frame is 9; the clip has 9", run, "CVVAEInsertLatents", samples=a, inserted=b, frame=9)


@check
def joins_without_a_vae_are_the_librarys():
    a, b, still = latents(3), latents(4, 1), latents(1, 2)
    expected = tools().join([as_clips(x["samples"]) for x in (a, b, still)])
    latent, frames = joined(a, b, still)
    close(as_clips(latent["samples"]), expected, 0)
    assert frames == 4 * 7 - 3
    whole = latents(9)["samples"]
    close(joined({"samples": whole[:5]}, {"samples": whole[4:]})[0]["samples"], whole, 0)
    images = {"cv_vae": {"mode": "image", "frames": 3}}
    latent, frames = joined(latents(3) | images, latents(3, 1) | images)
    assert frames == 6 == len(latent["samples"])
    raises("in one mode", joined, latents(3) | images, latents(3))


@check
def resample_in_latents_and_in_frames():
    vae = load()
    given = run("CVVAEEncode", pixels=clip(17), vae=vae)[0]
    slow, frames = run("CVVAEResampleLatents", samples=given, speed=0.5)
    assert frames == 34 and slow["cv_vae"]["frames"] == 34
    close(as_clips(slow["samples"]), tools().resample(as_clips(given["samples"]), 10), 0)
    fast, frames = run("CVVAEResampleLatents", samples=given, frames=9, vae=vae)
    assert frames == 9
    close(fast["samples"], vae.encode(vae.decode(given["samples"])[::2]))


@check
def layouts_go_there_and_back():
    torch = host.torch
    given = latents(6, noise_mask=mask_of(6), batch_index=list(range(6)))
    as_clip = run("CVVAELatentLayout", samples=given, layout=CLIP)[0]
    close(as_clip["samples"], as_clips(given["samples"]), 0)
    shape(as_clip["noise_mask"], 1, 1, 6, 48, 64)
    assert "batch_index" not in as_clip
    back = run("CVVAELatentLayout", samples=as_clip, layout=BATCH)[0]
    close(back["samples"], given["samples"], 0)
    close(back["noise_mask"], given["noise_mask"], 0)
    two, frames = run("CVVAELatentLayout", samples=given, layout=CLIP, clips=2)
    shape(two["samples"], 2, 4, 3, 6, 8)
    shape(two["noise_mask"], 2, 1, 3, 48, 64)
    assert frames == 9
    raises("hold 2 clips", run, "CVVAELatentLayout", samples=two, layout=BATCH)
    raises("6 latents cannot be 4 clips", run, "CVVAELatentLayout", samples=given, layout=CLIP, clips=4)
    images, frames = run("CVVAELatentLayout", samples=two, layout=IMAGES)
    close(images["samples"], given["samples"], 0)
    close(images["noise_mask"], given["noise_mask"], 0)
    assert frames == 6
    shape(run("CVVAEDecode", samples=images, vae=load())[0], 6, 48, 64, 3)
    again = run("CVVAELatentLayout", samples=images, layout=BATCH)[0]
    shape(run("CVVAEDecode", samples=again, vae=load("independent images"))[0], 21, 48, 64, 3)
    assert torch.equal(given["samples"], latents(6)["samples"])


@check
def statistics_report_and_plot():
    node = host.nodes.NODE_CLASS_MAPPINGS["CVVAELatentStatistics"]
    node.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)
    samples = latents(5)["samples"].clone() / 0.18215
    samples[0, 2, 0, 0] = float("nan")
    output = node.execute(samples={"samples": samples})
    report, plot = output.args
    assert report.startswith("17 frames in 5 latents of 8 x 6, 1 clip, float32"), report
    assert "1 of 960 values are NaN or infinite" in report and report.count("\n| ") == 6, report
    assert plot.ndim == 4 and plot.shape[-1] == 3 and output.ui.as_dict()["images"]
    report = node.execute(samples={"samples": host.torch.zeros(1, 8, 2, 4, 4)}).args[0]
    assert "distance" not in report, report


@check
def normalize_equals_the_library():
    given, reference = latents(5), latents(3, 1)
    reference["samples"] = reference["samples"] * 3 + 1
    out = run("CVVAENormalizeLatents", samples=given, reference=reference, strength=0.7)[0]["samples"]
    expected = tools().normalize(as_clips(given["samples"]), as_clips(reference["samples"]), strength=0.7)
    close(as_clips(out), expected, 0)
    raises("3 latents and the latents have 5", run, "CVVAENormalizeLatents", samples=given, reference=reference,
           over="each latent")
    close(run("CVVAENormalizeLatents", samples=given)[0]["samples"].std(), host.torch.tensor(5.49), 0.02)


@check
def empty_latents_for_frames():
    latent, frames = run("CVVAEEmptyLatents", width=100, height=64, frames=30, channels="16 (SD 3)")
    shape(latent["samples"], 9, 16, 8, 13)
    assert frames == 30 and latent["samples"].count_nonzero() == 0
    latent, frames = run("CVVAEEmptyLatents", width=100, height=60, frames=30, layout=CLIP)
    shape(latent["samples"], 1, 4, 9, 8, 13)
    shape(run("CVVAEDecode", samples=latent, vae=load())[0], 30, 60, 100, 3)


@check
def frames_and_latents_are_counted():
    calculate = lambda start, amount, fps=24.0, batch="video clip": run(  # noqa: E731
        "CVVAEFrameCalculator", start_from=start, amount=amount, fps=fps, batch_is=batch)
    assert calculate("latents", 25.0) == (25, 97, 24.0, 6, 97 / 24)
    assert calculate("frames", 53.0) == (14, 53, 24.0, 6, 53 / 24)
    assert calculate("frames", 54.0)[:2] == (15, 57)
    assert calculate("seconds", 2.0)[:2] == (13, 49)
    assert calculate("seconds", 0.7, 10.0)[:2] == (3, 9)  # 0.7 * 10 is a little more than 7
    assert calculate("seconds", 0.0) == (1, 1, 24.0, 6, 1 / 24)
    assert calculate("seconds", 2.0, 8.0, "independent images") == (16, 16, 8.0, 8, 2.0)


# -- preview -----------------------------------------------------------------------------------------


def previewed(**inputs):
    node = host.nodes.NODE_CLASS_MAPPINGS["CVVAEPreviewLatents"]
    node.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)
    return run("CVVAEPreviewLatents", **inputs)[0]


@check
def previews_show_what_was_encoded():
    torch, vae = host.torch, load()
    pixels = run("CVVAEExample", media="goats clip (33 frames)")[0][:9]
    latents = run("CVVAEEncode", pixels=pixels, vae=vae)[0]
    before = latents["samples"].clone()
    images = previewed(samples=latents)
    shape(images, 3, *pixels.shape[1:])
    expected = tools().load_preview("tiny").pictures(as_clips(latents["samples"]))
    close(images, (expected[0].movedim(0, -1) + 1) / 2)
    by_frame = previewed(samples=latents, show="one picture per frame")
    close(by_frame, images[[0, 1, 1, 1, 1, 2, 2, 2, 2]])
    error, contrast = (by_frame - pixels).square().mean(), (pixels - pixels.mean((0, 1, 2))).square().mean()
    assert error < contrast / 4, f"{error} instead of less than a quarter of {contrast}"
    shape(previewed(samples=latents, scale=1), 3, 16, 28, 3)
    assert torch.equal(latents["samples"], before), "the given latents were changed"


@check
def previews_of_both_layouts_batches_and_images():
    torch = host.torch
    batch, five = latents(5), latents(5, five=True)
    for show, count in (("one picture per latent", 5), ("one picture per frame", 17)):
        close(previewed(samples=batch, show=show), previewed(samples=five, show=show), 0)
        two = previewed(samples={"samples": torch.cat([five["samples"], latents(5, 1, five=True)["samples"]])}, show=show)
        close(two, torch.cat([previewed(samples=latents(5, seed), show=show) for seed in (0, 1)]))
        assert len(two) == 2 * count
    padded = latents(5, cv_vae={"mode": "video", "frames": 15})
    shape(previewed(samples=padded, show="one picture per frame"), 15, 48, 64, 3)
    shape(previewed(samples=latents(5, cv_vae={"mode": "image"}), show="one picture per frame"), 5, 48, 64, 3)


@check
def previews_refuse_what_cannot_be_shown():
    broken = latents(5)
    broken["samples"][3, 1, 0, 0] = float("nan")
    raises("1 of 960 values are NaN or infinite, the first of them in latent 3", previewed, samples=broken)
    sixteen = {"samples": host.torch.randn(2, 16, 6, 8)}
    raises("have 16 channels, and this preview is of a model with 4", previewed, samples=sixteen)
    raises("have 4 channels", previewed, samples=latents(2), model="16 channels (SD 3)")
    raises("This node works with CV-VAE models only", previewed, samples=latents(2), vae=object())


@check
def previews_by_channels_are_the_hosts():
    import comfy.latent_formats
    import latent_preview

    for model, name in (("4 channels (SD 1.x, SD 2.x, SVD)", "SD15"), ("16 channels (SD 3)", "SD3")):
        latent_format = getattr(comfy.latent_formats, name)()
        samples = 3 * host.torch.randn(1, latent_format.latent_channels, 6, 8)
        own = latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
        picture = own.decode_latent_to_preview(latent_format.process_in(samples))
        shown = host.torch.frombuffer(bytearray(picture.tobytes()), dtype=host.torch.uint8).view(1, 6, 8, 3) / 255
        close(previewed(samples={"samples": samples}, model=model, scale=1), shown, 1.01 / 255)  # it rounds down


@check
def previews_of_a_connected_vae_are_fitted_once():
    node = importlib.import_module(host.nodes.NODE_CLASS_MAPPINGS["CVVAEPreviewLatents"].__module__)
    vae, calls = host.native.NativeVAE(contract.small("sd3", 16), "video", host.torch.float32), []

    def coders(vae):
        decode, encode = importlib.import_module(f"{node.__package__}.latent_dict").coders(vae)
        return decode, lambda frames: calls.append(len(frames)) or encode(frames)

    samples = {"samples": host.torch.randn(2, 16, 6, 8)}
    with patch.object(node, "coders", coders), patch.object(node, "FILES", ["bee clip (33 frames)"]), \
            patch.object(node, "FRAMES_TO_FIT", 5):
        images = previewed(samples=samples, vae=vae)
        assert len(calls) == 3  # as it is, darker, lighter
        close(previewed(samples=samples, vae=vae), images, 0)
        assert len(calls) == 3
        bee = run("CVVAEExample", media="bee clip (33 frames)")[0][:5].movedim(-1, 0)[None] * 2 - 1
        library = importlib.import_module(f"{host.cvvae.__name__}.latents.preview")
        expected = library.fit_preview(library.pairs_of(lambda clip: vae.model.encode(clip).mode(), [bee]))
    close(images, (expected.pictures(as_clips(samples["samples"]))[0].movedim(0, -1) + 1) / 2, 1e-3)


@check
def the_samplers_own_preview_shows_our_latents():
    """While it samples, a sampler shows x0 by the format of its model; whatever layout latents came in."""
    import comfy.latent_formats
    import comfy.utils
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    shown, before, hook = [], args.preview_method, comfy.utils.PROGRESS_BAR_HOOK
    samples = run("CVVAEEncode", pixels=clip(9), vae=load())[0]["samples"]
    args.preview_method = LatentPreviewMethod.Latent2RGB
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: shown.append(preview))
    try:
        model = SimpleNamespace(load_device=host.torch.device("cpu"),
                                model=SimpleNamespace(latent_format=comfy.latent_formats.SD15()))
        callback = latent_preview.prepare_callback(model, 1)
        for x0 in (samples, as_clips(samples)):
            callback(0, x0 * 0.18215, x0, 1)
    finally:
        args.preview_method = before
        comfy.utils.set_progress_bar_global_hook(hook)
    assert [preview[1].size for preview in shown] == [(8, 6), (8, 6)]
    assert shown[0][1].tobytes() == shown[1][1].tobytes()  # the first latent


if __name__ == "__main__":
    contract.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
