"""What Load CV-VAE says about files, and Download CV-VAE with a local hub; run and read as contract.py.

    cd COMFYUI; python contract_weights.py PACK BASE_DIRECTORY [check ...]
"""

import asyncio
import importlib
import importlib.util
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch


def neighbour(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract, hub_server = neighbour("contract.py"), neighbour("../helpers/hub_server.py")
CHECKS, host, check, clip, close, load, raises, run, small = (
    getattr(contract, name) for name in "CHECKS host check clip close load raises run small".split())
CHECKS.clear()  # contract.py's own run by itself

hub = hub_server.HubServer({})
WEIGHTS, FILE = "vae3d_v1-1", "cv-vae_v1-1.safetensors"


def part(name):
    """A module of the pack."""
    return importlib.import_module(f"{host.cvvae.__name__.removesuffix('cvvae')}{name}")


def folder():
    return host.base / "models" / "vae"


def empty_folder():
    shutil.rmtree(folder())
    folder().mkdir()


def options():
    """The list of Load CV-VAE."""
    schema = host.nodes.NODE_CLASS_MAPPINGS["CVVAELoader"].define_schema()
    return next(entry.options for entry in schema.inputs if entry.id == "vae_name")


def errors_of(prompt):
    """What the host says to ``prompt`` before running it: the details of its errors."""
    import execution

    ok, error, _, node_errors = asyncio.run(execution.validate_prompt("1", prompt, None))
    details = [each["details"] for node in node_errors.values() for each in node["errors"]]
    assert ok == (not details), f"{error} {node_errors}"
    return details


def loader(vae_name):
    return {"class_type": "CVVAELoader", "inputs": {"vae_name": vae_name, "batch_is": "video clip", "dtype": "fp32"}}


def to_disk(*source):
    return {"class_type": "CVVAESave", "inputs": {"vae": list(source), "name": "x", "dtype": "fp16"}}


def refused_with(vae_name):
    [details] = errors_of({"1": loader(vae_name), "2": to_disk("1", 0)})
    return details


def image_vae():
    return host.cvvae.ImageVAE(host.cvvae.Config("image", 4, (32, 32, 32, 32), 1))


# -- the list ----------------------------------------------------------------------------------------


@check
def cv_vaes_stand_first_and_others_say_what_they_are():
    from safetensors.torch import save_file

    empty_folder()
    host.cvvae.save(image_vae(), folder() / "a image (1).safetensors")
    host.cvvae.save(small("sd3", 16), folder() / "z cv.safetensors")
    save_file({"unet.to_q.lora_A.weight": host.torch.zeros(1)}, folder() / "b lora.safetensors")
    host.torch.save(image_vae().state_dict(), folder() / "c image.ckpt")
    (folder() / "d half.safetensors").write_bytes((folder() / "z cv.safetensors").read_bytes()[:-5])
    (folder() / "sub").mkdir()
    host.cvvae.save(small("v1", 4), folder() / "sub" / "cv.safetensors")
    marked = ["a image (1).safetensors (image VAE)", "b lora.safetensors (LoRA)", "d half.safetensors (damaged)"]
    plain = ["tiny (built in)", os.path.join("sub", "cv.safetensors"), "z cv.safetensors", "c image.ckpt"]
    assert options() == plain + marked

    for name in plain:
        assert errors_of({"1": loader(name), "2": to_disk("1", 0)}) == [], name
    for name in (marked[0], "a image (1).safetensors"):
        assert "is an image VAE" in refused_with(name) and "node Inflate to CV-VAE" in refused_with(name)
    assert "truncated" in refused_with(marked[2]) and "Download it again" in refused_with(marked[2])
    raises("a image (1).safetensors is an image VAE", load, vae_name=marked[0])
    raises("c image.ckpt is an image VAE", load, vae_name="c image.ckpt")
    assert load(vae_name="z cv.safetensors").latent_channels == 16


@check
def a_file_that_changes_is_looked_at_again_and_only_then():
    empty_folder()
    path = folder() / "mine.safetensors"
    host.cvvae.save(image_vae(), path)
    looked = part("nodes.loader")
    with patch.object(looked, "refusal", wraps=looked.refusal) as refusal:
        assert options()[1:] == ["mine.safetensors (image VAE)"] and options()[1:] == ["mine.safetensors (image VAE)"]
        assert refusal.call_count == 1
        host.cvvae.save(small("v1", 4), path)
        assert options()[1:] == ["mine.safetensors"] and refusal.call_count == 2


@check
def a_file_that_is_not_there_is_told_where_to_get():
    empty_folder()
    details = refused_with("gone.safetensors")
    assert f"gone.safetensors is not in {folder()}" in details and "Download CV-VAE" in details, details
    details = refused_with(FILE)
    assert f"choose {WEIGHTS} and run it" in details and "https://huggingface.co/AILab-CVC/CV-VAE/resolve/main/" in details
    raises("choose vae3d_sd3 and run it", load, vae_name="cv-vae_sd3.safetensors")


# -- downloading -------------------------------------------------------------------------------------


def publish():
    """A small CV-VAE on the hub; its model."""
    empty_folder()
    hub.seen.clear()
    vae = small("v1", 4)
    path = host.base / "published.safetensors"
    host.cvvae.save(vae, path)
    hub.files = {part("cvvae.download").PUBLISHED[WEIGHTS].path: path.read_bytes()}
    return vae


@check
def what_it_downloads_loads():
    import comfy.utils

    published = publish()
    texts, bar = [], []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *args, **kwargs: bar.append((value, total)))
    try:
        with patch.object(part("nodes.download"), "show_text", lambda text, node: texts.append(text)):
            [name] = run("CVVAEDownload", weights=WEIGHTS)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert name == FILE and options()[1:] == [FILE] and os.listdir(folder()) == [FILE]
    size = (folder() / FILE).stat().st_size
    assert bar[-1] == (size, size) and bar[0][0] < size
    assert any(" MB/s, " in text for text in texts) and texts[-1] == f"{FILE} is there", texts
    z = host.torch.ones(1, 4, 2, 2, 2)
    close(load(vae_name=name).model.decode(z), published.decode(z))
    connections = len(hub.seen)
    assert run("CVVAEDownload", weights=WEIGHTS) == (FILE,) and len(hub.seen) == connections


@check
def its_output_fits_the_loader():
    downloaded = {"class_type": "CVVAEDownload", "inputs": {"weights": WEIGHTS}}
    assert errors_of({"1": downloaded, "2": loader(["1", 0]), "3": to_disk("2", 0)}) == []


@check
def it_runs_again_only_if_the_file_has_gone():
    publish()
    node = host.nodes.NODE_CLASS_MAPPINGS["CVVAEDownload"]
    before = node.fingerprint_inputs(weights=WEIGHTS)
    run("CVVAEDownload", weights=WEIGHTS)
    there = node.fingerprint_inputs(weights=WEIGHTS)
    assert there != before and there == node.fingerprint_inputs(weights=WEIGHTS)
    empty_folder()
    assert node.fingerprint_inputs(weights=WEIGHTS) == before


@check
def cancel_stops_a_download_that_hangs_and_the_next_goes_on():
    publish()
    [content] = hub.files.values()
    hub.cut_after, hub.cuts = 2**20, 1
    threading.Timer(0.3, hub.hang.set).start()  # while it waits to open the connection again
    threading.Timer(1.5, host.management.interrupt_current_processing).start()
    started = time.monotonic()
    try:
        run("CVVAEDownload", weights=WEIGHTS)
        raise AssertionError("not cancelled")
    except host.management.InterruptProcessingException:
        pass
    finally:
        hub.hang.clear()
        host.management.interrupt_current_processing(False)
    assert time.monotonic() - started < 3, "Cancel took too long"
    [partial] = folder().iterdir()
    assert partial.name.startswith(f".{FILE}.") and 0 < partial.stat().st_size < len(content)
    kept = partial.stat().st_size
    assert options() == ["tiny (built in)"]
    assert run("CVVAEDownload", weights=WEIGHTS) == (FILE,) and (folder() / FILE).read_bytes() == content
    assert hub.headers_of("storage", "GET")[-1]["range"] == f"bytes={kept}-"


@check
def what_goes_wrong_is_said():
    publish()
    hub.hash_stated = "0" * 64
    raises("so it was removed. Download again", run, "CVVAEDownload", weights=WEIGHTS)
    hub.hash_stated = None
    hub.status = {"hub": 404}
    raises(f"save it as {folder() / FILE}", run, "CVVAEDownload", weights=WEIGHTS)
    hub.status = {}
    assert os.listdir(folder()) == []


if __name__ == "__main__":
    with hub:
        os.environ["HF_ENDPOINT"] = hub.address()  # before anything of the host imports huggingface_hub
        contract.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
