"""Weights in and out: reading files safely, telling what they hold, building the model, writing whole files.

Every way a file can be wrong has its own message: what was found, what was expected, what to do.
Pickles are read by ``torch.load(weights_only=True)`` only, so nothing in them is ever executed.
"""

import json
import os
import pickle
import secrets
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import keys
from .config import LEVELS, Config
from .keys import State
from .vae import Autoencoder, ImageVAE, VideoVAE

BUILT_IN = Path(__file__).parent / "weights"
PREFIXES = ("first_stage_model.", "vae.")
PUBLISHED = "node Download CV-VAE, `python -m cvvae download vae3d_v1-1`, or https://huggingface.co/AILab-CVC/CV-VAE"
DAMAGED = "damaged"
# As the headers of safetensors name them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
SAFETENSORS, PICKLES = (".safetensors", ".sft"), (".ckpt", ".pt", ".pth", ".bin")
# Beside the autoencoder, the official .ckpt holds what only its training needs.
TRAINING_ONLY = ("loss.", "discriminator.", "constraint_encoder.", "constraint_decoder.", "model_ema.")

Source = str | os.PathLike | State


class CheckpointError(ValueError):
    """A file or state dict that is not what was asked for.  kind: what it is instead, in a word or two."""

    def __init__(self, message: str, kind: str = "not a CV-VAE"):
        super().__init__(message)
        self.kind = kind


def load(source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", ops=nn) -> VideoVAE:
    """Load a CV-VAE.

    source: "tiny" (the built-in demonstration model), a ``.safetensors`` or official ``.ckpt`` file, a
        folder in diffusers form, or a state dict.  Names may start with ``first_stage_model.`` or ``vae.``.
    dtype, device: of the loaded weights, whatever the file's dtype.
    ops: where layers come from, ``torch.nn`` or a namespace like it (ComfyUI's ``comfy.ops``).

    Variant, widths and latent channels are read off the tensors.  Raises CheckpointError or
    FileNotFoundError.
    """
    state, config = _as_video_vae(*_read(source, {"tiny": BUILT_IN / "tiny.safetensors"}))
    return _build(VideoVAE, config, state, dtype, device, ops)


def refusal(path: str | os.PathLike) -> CheckpointError | None:
    """Why :func:`load` would refuse a ``.safetensors``, judged by its header alone; None if it would not.

    Takes milliseconds, whatever the size of the file.  Raises OSError if it cannot be read.
    """
    path = Path(path)
    try:
        _refuse_other_formats(path)
        with _opened(path) as file:
            state = {name: _described(file, name) for name in file.keys()}
        _as_video_vae(state, str(path))
    except CheckpointError as error:
        return error
    return None


def load_image_vae(source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> ImageVAE:
    """Load a KL image VAE of the SD layout: SD 1.x/2.x, SDXL, SD3, FLUX.1, in either naming.

    Arguments and errors as :func:`load`; "tiny" is the built-in one.  ``quant_conv`` and
    ``post_quant_conv`` are folded into their neighbours.
    """
    state, where = _read(source, {"tiny": BUILT_IN / "tiny_image.safetensors"})
    state = _autoencoder_part(state)
    _refuse_strangers(state, where)
    if state["encoder.conv_in.weight"].ndim == 5:
        raise CheckpointError(f"{where} is a video VAE (its kernels are 3-D), not an image VAE. Load it with Load CV-VAE "
                              "or cvvae.load; an image VAE is, for example, SD's vae-ft-mse-840000.", "video VAE")
    state = _fold_quant_convs(keys.canonical(state), where)
    return _build(ImageVAE, _checked("image", state, where), state, dtype, device, nn)


def save(vae: Autoencoder, path: str | os.PathLike, dtype: torch.dtype | None = None, metadata: dict | None = None) -> None:
    """Write ``vae`` as one ``.safetensors`` that :func:`load` reads, under the published names of its variant.

    dtype: of the stored tensors; by default the model's.  metadata: JSON-ready facts kept in the header.
    The file appears under its name only when whole.
    """
    state = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
             for name, tensor in keys.published(vae.state_dict(), vae.config.variant).items()}
    header = {"format": "pt", "cvvae": json.dumps({"config": vae.config.describe()} | (metadata or {}))}
    write_whole(path, lambda partial: save_file(state, partial, header))


def write_whole(path: str | os.PathLike, write) -> None:
    """Call ``write(temporary path)`` and rename the result to ``path``; nothing half-written keeps that name."""
    path = Path(path)
    partial = partial_path(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask gives; safetensors writes for the owner only
        write(str(partial))
        partial.chmod(mode)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A hidden name beside ``path``, for what is being written and no other process writes."""
    # A token, because processes in containers, which share a folder, have the same numbers.
    return path.with_name(f".{path.name}.partial{os.getpid()}-{secrets.token_hex(4)}")


def read_metadata(path: str | os.PathLike) -> dict:
    """What :func:`save` wrote beside the tensors of a ``.safetensors``; {} for other people's files."""
    with _opened(Path(path)) as file:
        return _own_metadata(file.metadata())


# -- reading files -----------------------------------------------------------------------------------


def _read(source: Source, built_in: dict[str, Path]) -> tuple[State, str]:
    """Tensors, and what to call the source in messages."""
    if isinstance(source, dict):
        if not source or not all(isinstance(tensor, Tensor) for tensor in source.values()):
            raise CheckpointError("The state dict is empty or holds values that are not tensors.")
        return dict(source), "The state dict"
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"Expected a path, 'tiny' or a state dict, found {type(source).__name__}.")
    path = built_in.get(str(source), Path(source))
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file: {path}. Published CV-VAE weights: {PUBLISHED}; 'tiny' is built in.")
    return read_tensors(path), str(path)


def read_tensors(path: Path) -> State:
    """All tensors of a weight file of any kind; nothing in it is executed.  Raises CheckpointError."""
    if path.suffix not in SAFETENSORS + PICKLES:
        raise CheckpointError(f"{path}: expected a {', '.join(SAFETENSORS + PICKLES)} file or a folder, "
                              f"found the suffix {path.suffix!r}.")
    _refuse_other_formats(path)
    if path.suffix in SAFETENSORS:
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    return _read_pickle(path)


def _read_folder(folder: Path) -> tuple[State, str]:
    """A diffusers folder: config.json beside the weights, itself or in a ``vae`` subfolder."""
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    weights = _weights_of(folder)
    state, _ = _read(weights, {})
    config = folder / "config.json"
    if config.exists():
        try:
            groups = json.loads(config.read_text(encoding="utf-8")).get("norm_num_groups", Config.norm_groups)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{config} is not a JSON object ({error}); download it again.") from None
        if type(groups) is not int or groups < 1:
            raise CheckpointError(f"{config}: norm_num_groups is {groups!r}, expected a whole number, 1 or more.")
        state["norm_groups"] = torch.tensor(groups)
    return state, str(folder)


def _weights_of(folder: Path) -> Path:
    """The one weight file of a folder: safetensors before pickles, full precision before variants (``.fp16.``)."""
    for suffixes in (SAFETENSORS, PICKLES):
        found = sorted((path for path in folder.iterdir() if path.suffix in suffixes), key=lambda path: len(path.suffixes))
        plain = [path for path in found if len(path.suffixes) == len(found[0].suffixes)]
        if len(plain) > 1:
            raise CheckpointError(f"{folder} holds several weight files ({', '.join(path.name for path in plain[:4])}); "
                                  "name the one to load.")
        if plain:
            return plain[0]
    raise CheckpointError(f"{folder} holds no weights: expected a .safetensors file beside config.json.")


def _refuse_other_formats(path: Path) -> None:
    """Name the usual things that are saved under a weight file's name."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty; download it again.", DAMAGED)
    # A safetensors file starts with 8 bytes of header length, which may spell "<", and then "{".
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<" and head[8:9] != b"{":
        raise CheckpointError(f"{path} is a web page, not weights: the download fetched the site's page (a login or an "
                              "error) instead of the file. Download it again with the site's download button.", DAMAGED)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` or download the file itself.",
                              DAMAGED)


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(_explain_broken(path, error), DAMAGED) from None


def _described(file, name: str) -> Tensor:
    """The tensor ``name`` without its data, but for the one that is read as a number."""
    if name.endswith("norm_groups"):
        return file.get_tensor(name)
    entry = file.get_slice(name)
    return torch.empty(entry.get_shape(), dtype=DTYPES.get(entry.get_dtype(), torch.uint8), device="meta")


def _explain_broken(path: Path, error: Exception) -> str:
    """Truncated or not a safetensors file?  The header says how long the file should be."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = file.read(min(header_size, 100_000_000))
    if header[:1] == b"{":
        if len(header) < header_size:
            return f"{path} is truncated: it ends inside its header after {size} bytes. Download it again."
        try:
            entries = json.loads(header)
            end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
            if 8 + header_size + end > size:
                return (f"{path} is truncated: {size} bytes found, {8 + header_size + end} expected. "
                        "Download it again.")
        except (ValueError, KeyError, TypeError, IndexError):
            pass
    return f"{path} is not a safetensors file or is damaged ({error}). Download it again."


def _read_pickle(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors or is damaged, so it was not opened: nothing in it was "
                              f"executed. Use the .safetensors of the same model. ({str(error).splitlines()[0]})") from None
    except Exception as error:  # the unpickler trips over damaged bytes in many ways: IndexError, UnicodeDecodeError, ...
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is truncated or damaged ({what}). Download it again.") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors.")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _own_metadata(header: dict | None) -> dict:
    try:
        own = json.loads((header or {}).get("cvvae", "{}"))
    except json.JSONDecodeError:
        return {}
    return own if isinstance(own, dict) else {}


# -- telling what the tensors are --------------------------------------------------------------------


def _autoencoder_part(state: State) -> State:
    """The tensors under a known prefix if there is one, without those only training needs."""
    for prefix in PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in state:
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()
                     if name.startswith(prefix) or name == "norm_groups"}
            break
    return {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}


def _as_video_vae(state: State, where: str) -> tuple[State, Config]:
    """``state`` under canonical names, and the network it is for; raises CheckpointError if it is no CV-VAE."""
    state = _autoencoder_part(state)
    _refuse_strangers(state, where)
    if state["encoder.conv_in.weight"].ndim == 4:
        raise CheckpointError(
            f"{where} is an image VAE (its kernels are 2-D), not a CV-VAE. ComfyUI's own Load VAE loads it; to make a video "
            "VAE of it, inflate it (node Inflate to CV-VAE, `python -m cvvae inflate`). Published CV-VAE weights: "
            f"{PUBLISHED}.", "image VAE")
    state = _with_3d_shortcuts(keys.canonical(state))
    if "decoder.mid.attn_1.gamma_t" in state:
        variant = "inflated"
    elif "decoder.mid.attn_1.q_t.weight" in state:
        variant = "v1"
    else:
        variant = "sd3"
    return state, _checked(variant, state, where)


def _refuse_strangers(state: State, where: str) -> None:
    """Recognise files that are no autoencoder of this kind at all."""
    if "encoder.conv_in.weight" in state and "decoder.conv_in.weight" in state:
        return
    if any(part in name for name in state for part in ("lora_up", "lora_down", "lora_A", "lora_B", ".lora.")):
        raise CheckpointError(f"{where} is a LoRA, not a VAE. Move it to models/loras and load it with a LoRA loader node.",
                              "LoRA")
    if any(name.startswith(("model.diffusion_model.", "double_blocks.", "transformer.")) for name in state):
        raise CheckpointError(f"{where} is a diffusion model without a VAE inside. Expected the VAE's own file. Published "
                              f"CV-VAE weights: {PUBLISHED}.", "diffusion model")
    if any(name.startswith(("encoder.", "decoder.")) for name in state):
        missing = [name for name in ("encoder.conv_in.weight", "decoder.conv_in.weight") if name not in state]
        raise CheckpointError(f"{where} misses {' and '.join(missing)}: it is incomplete or another kind of autoencoder. "
                              "Expected a CV-VAE or an image VAE of the SD layout; others load with ComfyUI's own Load VAE. "
                              f"Published CV-VAE weights: {PUBLISHED}.", "another VAE")
    some = ", ".join(sorted(state)[:3]) or "nothing"
    raise CheckpointError(f"{where} holds no VAE of this kind: expected encoder.* and decoder.* tensors, found {some} ... "
                          f"Published CV-VAE weights: {PUBLISHED}.")


def _with_3d_shortcuts(state: State) -> State:
    """vae3d_sd3 stores 1x1 shortcuts as 2-D kernels; the definition has them 3-D, the same arithmetic."""
    return {name: tensor[:, :, None] if name.endswith("nin_shortcut.weight") and tensor.ndim == 4 else tensor
            for name, tensor in state.items()}


def _fold_quant_convs(state: State, where: str) -> State:
    """Fold SD's 1x1 quant_conv into the encoder's last layer and post_quant_conv into the decoder's first.

    post_quant_conv's bias does not reach the zero border of the next layer.  P z + p = P (z - c) with
    c = -P^-1 p, so its weight is folded and c stays as ``decoder.latent_shift``.  In float64.
    """
    state = dict(state)
    for layer in ("quant_conv", "post_quant_conv"):
        missing = [name for name in (f"{layer}.weight", f"{layer}.bias") if name not in state]
        if len(missing) == 1:
            raise CheckpointError(f"{where} misses {missing[0]}.")
    latent_channels = state["decoder.conv_in.weight"].shape[1]
    shift = torch.zeros(latent_channels)
    if "quant_conv.weight" in state:
        weight, bias = state.pop("quant_conv.weight").double().flatten(1), state.pop("quant_conv.bias").double()
        out_weight, out_bias = state["encoder.conv_out.weight"].double(), state["encoder.conv_out.bias"].double()
        _expect(weight.shape[1] == out_weight.shape[0], where, "quant_conv.weight", weight, out_weight.shape[0])
        state["encoder.conv_out.weight"] = torch.einsum("om,m...->o...", weight, out_weight).float()
        state["encoder.conv_out.bias"] = (weight @ out_bias + bias).float()
    if "post_quant_conv.weight" in state:
        weight, bias = state.pop("post_quant_conv.weight").double().flatten(1), state.pop("post_quant_conv.bias").double()
        _expect(weight.shape == (latent_channels, latent_channels), where, "post_quant_conv.weight", weight, latent_channels)
        exact = torch.linalg.lstsq(weight, -bias[:, None]).solution[:, 0]
        if not torch.allclose(weight @ exact, -bias, atol=1e-6):
            raise CheckpointError(f"{where}: post_quant_conv.weight is singular, so it cannot be folded exactly.")
        shift = exact.float()
        state["decoder.conv_in.weight"] = torch.einsum(
            "oc...,ci->oi...", state["decoder.conv_in.weight"].double(), weight).float()
    state.setdefault("decoder.latent_shift", shift)
    return state


def _expect(fits: bool, where: str, name: str, found: Tensor, channels: int) -> None:
    if not fits:
        raise CheckpointError(f"{where}: {name} has shape {list(found.shape)}, which does not fit {channels} channels.")


# -- building ----------------------------------------------------------------------------------------


def _checked(variant: str, state: State, where: str) -> Config:
    """The network that ``state`` fits, tensor by tensor."""
    config = _read_config(variant, state, where)
    if config.norm_groups == Config.norm_groups:
        state.pop("norm_groups", None)  # a config.json may say it; the model stores only other numbers
    _compare(state, _shapes(config), where)
    return config


@lru_cache(maxsize=16)
def _shapes(config: Config) -> dict[str, torch.Size]:
    """What a network holds, without its memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Autoencoder(config).state_dict().items()}


def _build(kind: type, config: Config, state: State, dtype, device, ops):
    with torch.device(device):
        vae = kind(config, ops)
    vae.to(dtype)
    vae.load_state_dict(state)
    return vae


def _read_config(variant: str, state: State, where: str) -> Config:
    levels = {name.split(".")[2] for name in state if name.startswith("encoder.down.")}
    if levels != {str(i) for i in range(LEVELS)}:
        raise CheckpointError(f"{where} has {len(levels)} resolution levels, expected {LEVELS} (8x8 compression). It is "
                              "another kind of VAE, which ComfyUI's own Load VAE may know.", "another VAE")
    blocks = len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")})
    first_convs = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(LEVELS)]
    missing = [name for name in first_convs if name not in state]
    if missing:
        raise CheckpointError(f"{where} misses {', '.join(missing)}: it is cut down or another kind of VAE. Download it "
                              "again, or try ComfyUI's own Load VAE.")
    widths = tuple(state[name].shape[0] for name in first_convs)
    groups = int(state["norm_groups"]) if "norm_groups" in state else Config.norm_groups
    if any(width % groups for width in widths):
        raise CheckpointError(f"{where} has widths {widths}, expected multiples of {groups}: group norms have {groups} "
                              "groups, unless a diffusers folder's config.json says otherwise.")
    return Config(variant, state["decoder.conv_in.weight"].shape[1], widths, blocks, groups)


def _compare(state: State, expected: dict[str, torch.Size], where: str) -> None:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    wrong = [f"{name} {list(state[name].shape)} (expected {list(expected[name])})"
             for name in expected if name in state and state[name].shape != expected[name]]
    kinds = [f"{name} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in state.items()
             if name != "norm_groups"
             and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    problems = [f"{title}: {listed(names)}" for title, names in
                (("missing", missing), ("unknown", unknown), ("wrong shape", wrong), ("unsupported dtype", kinds)) if names]
    if problems:
        raise CheckpointError(f"{where} is not a complete VAE of this layout; {'; '.join(problems)}. "
                              "The file is damaged, cut down or another model: download it again, or see "
                              "`python -m cvvae info`.")
