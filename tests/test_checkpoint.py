"""Files in and out: what loads, what is refused with which message, and that nothing in a file is executed."""

import json
import math
import os
import pickle
import re
import struct

import pytest
import torch
from compare import distance
from image_oracle import LAYOUTS, image_state
from random_weights import VARIANTS, noise, video_clip, video_config, video_shapes, video_state, video_vae
from safetensors.torch import load_file, save_file

import cvvae
import cvvae.checkpoint
from cvvae import CheckpointError
from cvvae.checkpoint import read_metadata, refusal

HALVES = [torch.float16, torch.bfloat16]


def same(found: cvvae.VideoVAE, expected: cvvae.VideoVAE) -> bool:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    return (found.config == expected.config and found_state.keys() == expected_state.keys()
            and all(torch.equal(found_state[name], tensor) for name, tensor in expected_state.items()))


@pytest.fixture
def file(tmp_path):
    """A whole, small vae3d-like .safetensors."""
    path = tmp_path / "vae.safetensors"
    save_file(video_state("v1"), path)
    return path


class TestRoundTrip:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_save_and_load(self, variant, tmp_path):
        vae = video_vae(variant)
        cvvae.save(vae, tmp_path / "vae.safetensors")
        loaded = cvvae.load(tmp_path / "vae.safetensors")
        assert same(loaded, vae)
        assert not loaded.training
        assert loaded.tiling == cvvae.Tiling()
        assert torch.equal(loaded.encode(video_clip(5)).mean, vae.encode(video_clip(5)).mean)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_files_have_the_published_names_and_shapes(self, variant, tmp_path):
        cvvae.save(video_vae(variant), tmp_path / "vae.safetensors")
        stored, published = load_file(tmp_path / "vae.safetensors"), video_state(variant)
        assert stored.keys() == published.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in published.items())

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", HALVES)
    def test_stored_and_loaded_dtypes_are_independent(self, variant, dtype, tmp_path):
        vae, path = video_vae(variant), tmp_path / "vae.safetensors"
        cvvae.save(vae, path, dtype)
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
        assert vae.dtype == torch.float32
        assert same(cvvae.load(path, dtype), video_vae(variant, dtype))
        rounded = cvvae.load(path)
        assert rounded.dtype == torch.float32
        assert same(rounded, video_vae(variant, dtype).float())

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_own_state_dict_loads(self, variant):
        vae = video_vae(variant)
        assert same(cvvae.load(vae.state_dict()), vae)

    def test_the_loaded_model_is_a_copy(self):
        state = {name: tensor.clone() for name, tensor in video_state("v1").items()}
        vae = cvvae.load(state)
        state["encoder.conv_in.weight"].zero_()
        assert same(vae, video_vae("v1"))

    def test_image_vae(self, tmp_path):
        vae = cvvae.load_image_vae(image_state(LAYOUTS["sd"]))
        cvvae.save(vae, tmp_path / "image.safetensors")
        loaded = cvvae.load_image_vae(tmp_path / "image.safetensors")
        again = cvvae.load_image_vae(vae.state_dict())
        latents = noise(1, 4, 2, 3)
        assert torch.equal(loaded.decode(latents), vae.decode(latents))
        assert torch.equal(again.decode(latents), vae.decode(latents))


class TestWhatIsRead:
    @pytest.mark.parametrize("variant, widths, blocks", [("v1", (32, 64, 128, 128), 2), ("sd3", (64, 32, 32, 96), 1)])
    def test_shape_is_read_off_the_tensors(self, variant, widths, blocks):
        config = video_config(variant, widths, blocks)
        assert cvvae.load(cvvae.VideoVAE(config).state_dict()).config == config

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variant_is_read_off_the_tensors(self, variant):
        assert cvvae.load(video_state(variant)).config == video_config(variant)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
    def test_prefixes(self, variant, prefix):
        state = {prefix + name: tensor for name, tensor in video_state(variant).items()}
        state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)  # a whole checkpoint holds a UNet too
        assert same(cvvae.load(state), video_vae(variant))

    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
    def test_pickled_state_dicts(self, suffix, tmp_path):
        torch.save(video_state("v1"), tmp_path / f"vae{suffix}")
        assert same(cvvae.load(tmp_path / f"vae{suffix}"), video_vae())

    @pytest.mark.parametrize("prefix", ["", "first_stage_model."])
    def test_official_ckpt(self, prefix, tmp_path):
        state = {prefix + name: tensor for name, tensor in video_state("v1").items()}
        state |= {prefix + "loss.discriminator.main.0.weight": torch.zeros(2, 2),
                  prefix + "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}
        torch.save({"state_dict": state, "global_step": 7, "epoch": 1, "pytorch-lightning_version": "2.0"},
                   tmp_path / "cv_vae.ckpt")
        assert same(cvvae.load(str(tmp_path / "cv_vae.ckpt")), video_vae())

    @pytest.mark.parametrize("dtype", HALVES + [torch.float64])
    def test_any_float_dtype(self, dtype):
        vae = cvvae.load({name: tensor.to(dtype) for name, tensor in video_state("sd3").items()})
        assert vae.dtype == torch.float32
        assert distance(vae.encoder.conv_in.weight.data, video_state("sd3")["encoder.conv_in.weight"]) < 0.05

    @pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
    def test_safetensors_whatever_the_header_size(self, suffix, tmp_path):
        """The first bytes are the header's length; these spell a space and '<', as a web page could."""
        save_file(video_state("v1"), tmp_path / "plain.safetensors")
        content = (tmp_path / "plain.safetensors").read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        padded = 0x13C20
        assert size < padded
        path = tmp_path / f"vae{suffix}"
        path.write_bytes(struct.pack("<Q", padded) + content[8:8 + size].ljust(padded) + content[8 + size:])
        assert path.read_bytes()[:2] == b" <"
        assert same(cvvae.load(path), video_vae())

    def test_ops_namespace_makes_the_layers(self):
        class Ops:
            Conv2d, GroupNorm = torch.nn.Conv2d, torch.nn.GroupNorm
            Linear, LayerNorm = torch.nn.Linear, torch.nn.LayerNorm

            class Conv3d(torch.nn.Conv3d):
                pass

        vae = cvvae.load(video_state("v1"), ops=Ops)
        assert isinstance(vae.decoder.conv_out, Ops.Conv3d)
        assert same(vae, video_vae())


class TestFolders:
    @staticmethod
    def fill(folder, variant="sd3", config=None):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(video_state(variant), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(config if config is not None else {"norm_num_groups": 32}))

    def test_diffusers_folder(self, tmp_path):
        self.fill(tmp_path)
        assert same(cvvae.load(tmp_path), video_vae("sd3"))

    def test_vae_subfolder(self, tmp_path):
        self.fill(tmp_path / "vae")
        (tmp_path / "model_index.json").write_text("{}")
        assert same(cvvae.load(str(tmp_path)), video_vae("sd3"))

    def test_safetensors_are_preferred_to_pickles(self, tmp_path):
        self.fill(tmp_path)
        (tmp_path / "a.ckpt").write_bytes(b"never opened")
        assert same(cvvae.load(tmp_path), video_vae("sd3"))

    def test_number_of_norm_groups_comes_from_the_config(self, tmp_path):
        self.fill(tmp_path, "v1", {"norm_num_groups": 16})
        vae = cvvae.load(tmp_path)
        assert vae.config.norm_groups == vae.encoder.norm_out.num_groups == 16
        cvvae.save(vae, tmp_path / "saved.safetensors")
        assert cvvae.load(tmp_path / "saved.safetensors").config.norm_groups == 16
        assert same(cvvae.load(vae.state_dict()), vae)

    def test_without_weights(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="holds no weights: expected a .safetensors file beside config.json"):
            cvvae.load(tmp_path)

    def test_full_precision_is_preferred_to_variants(self, tmp_path):
        self.fill(tmp_path)
        (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never opened")
        assert same(cvvae.load(tmp_path), video_vae("sd3"))

    def test_several_models_are_not_guessed_between(self, tmp_path):
        self.fill(tmp_path)
        save_file(video_state("v1"), tmp_path / "another.safetensors")
        with pytest.raises(CheckpointError, match="several weight files .*another.safetensors.*name the one"):
            cvvae.load(tmp_path)

    @pytest.mark.parametrize("groups", [0, "32", 2.5, None])
    def test_norm_groups_that_cannot_be(self, groups, tmp_path):
        self.fill(tmp_path, "sd3", {"norm_num_groups": groups})
        with pytest.raises(CheckpointError, match="norm_num_groups is .*expected a whole number"):
            cvvae.load(tmp_path)

    def test_norm_groups_reach_prefixed_tensors(self, tmp_path):
        self.fill(tmp_path, "v1", {"norm_num_groups": 16})
        prefixed = {f"vae.{name}": tensor for name, tensor in video_state("v1").items()}
        save_file(prefixed, tmp_path / "diffusion_pytorch_model.safetensors")
        assert cvvae.load(tmp_path).config.norm_groups == 16

    @pytest.mark.parametrize("text", ["<html>", "[1]", "{"])
    def test_broken_config(self, text, tmp_path):
        self.fill(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json is not a JSON object"):
            cvvae.load(tmp_path)


EIGHT_GROUPS = cvvae.VideoVAE(cvvae.Config("v1", 4, (24, 24, 24, 24), 1, norm_groups=8))


def without(*names: str) -> dict:
    return {name: tensor for name, tensor in video_state("v1").items() if name not in names}


class TestWrongTensors:
    """Each mistake has its own message."""

    @pytest.mark.parametrize("state, message", [
        (without("encoder.norm_out.bias"), "missing: encoder.norm_out.bias[.;]"),
        (without("decoder.mid.attn_1.q.weight"), "missing: decoder.mid.attn_1.q.weight"),
        (without("decoder.conv_in.weight"), "misses decoder.conv_in.weight"),
        (without("encoder.down.1.block.0.conv1.weight"), "misses encoder.down.1.block.0.conv1.weight"),
        (without(*[name for name in video_state("v1") if name.startswith("encoder.down.3.")]),
         "3 resolution levels, expected 4"),
        ({name: tensor for name, tensor in video_state("v1").items() if name.startswith("decoder.")},
         "misses encoder.conv_in.weight"),
        (video_state("v1") | {"encoder.extra.weight": torch.zeros(1)}, "unknown: encoder.extra.weight"),
        (video_state("v1") | {"encoder.norm_out.bias": torch.zeros(63)},
         r"wrong shape: encoder.norm_out.bias \[63\] \(expected \[64\]\)"),
        (video_state("v1") | {"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int8)},
         "unsupported dtype: decoder.conv_out.bias int8"),
        ({name: tensor for name, tensor in EIGHT_GROUPS.state_dict().items() if name != "norm_groups"},
         r"widths \(24, 24, 24, 24\), expected multiples of 32"),
        (image_state(LAYOUTS["sd"]), r"is an image VAE \(its kernels are 2-D\), not a CV-VAE.*inflate"),
        (image_state(LAYOUTS["flux_diffusers"]), "is an image VAE"),
        ({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, "is a LoRA, not a VAE"),
        ({"unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(1)}, "is a LoRA, not a VAE"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, "a diffusion model without a VAE"),
        ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "a diffusion model without a VAE"),
        ({"conv_in.weight": torch.zeros(1), "down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
         "holds no VAE of this kind.*found conv_in.weight"),
        ({}, "empty or holds values that are not tensors"),
        ({"encoder.conv_in.weight": 1}, "empty or holds values that are not tensors"),
    ])
    def test_message(self, state, message):
        with pytest.raises(CheckpointError, match=message):
            cvvae.load(state)

    def test_many_names_are_counted(self):
        norms = [name for name in video_state("v1") if name.startswith("encoder.") and name.endswith("norm1.bias")]
        with pytest.raises(CheckpointError, match=f"missing: {re.escape(norms[0])}, .* and {len(norms) - 4} more"):
            cvvae.load(without(*norms))

    def test_a_file_is_named_in_the_message(self, tmp_path):
        save_file(without("encoder.norm_out.bias"), tmp_path / "cut.safetensors")
        with pytest.raises(CheckpointError, match="cut.safetensors is not a complete VAE"):
            cvvae.load(tmp_path / "cut.safetensors")

    @pytest.mark.parametrize("state, message", [
        (video_state("v1"), r"is a video VAE \(its kernels are 3-D\), not an image VAE"),
        ({name: tensor for name, tensor in image_state(LAYOUTS["sdxl"]).items() if name != "quant_conv.bias"},
         "misses quant_conv.bias"),
        (image_state(LAYOUTS["sdxl"]) | {"quant_conv.weight": torch.zeros(4, 4, 1, 1)},
         r"quant_conv.weight has shape \[4, 4\], which does not fit 8 channels"),
        (image_state(LAYOUTS["sdxl"]) | {"post_quant_conv.weight": torch.zeros(4, 4, 1, 1)},
         "post_quant_conv.weight is singular"),
    ])
    def test_image_vae_message(self, state, message):
        with pytest.raises(CheckpointError, match=message):
            cvvae.load_image_vae(state)

    @pytest.mark.parametrize("source", [None, 3, b"vae"])
    def test_not_a_source(self, source):
        with pytest.raises(CheckpointError, match=f"found {type(source).__name__}"):
            cvvae.load(source)


class TestBrokenFiles:
    PAGE = b"\n<!DOCTYPE html><html><head><title>Log in</title></head></html>"
    POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 730\n"

    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    @pytest.mark.parametrize("content, message", [(b"", "is empty; download it again"), (PAGE, "is a web page"),
                                                  (POINTER, "is a Git LFS pointer")])
    def test_something_else_under_that_name(self, suffix, content, message, tmp_path):
        path = tmp_path / f"vae{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{path.name} {message}"):
            cvvae.load(path)
        with pytest.raises(CheckpointError, match=f"{path.name} {message}"):
            cvvae.load_image_vae(path)

    def test_truncated_in_the_header(self, file):
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(CheckpointError, match="truncated: it ends inside its header after 500 bytes"):
            cvvae.load(file)

    def test_truncated_in_the_data(self, file):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1000])
        with pytest.raises(CheckpointError, match=f"truncated: {len(whole) - 1000} bytes found, {len(whole)} expected"):
            cvvae.load(file)

    @pytest.mark.parametrize("content", [b"abc", b"PK\x03\x04" + bytes(100), struct.pack("<Q", 20) + b"{not json}" * 2])
    def test_not_safetensors(self, content, tmp_path):
        path = tmp_path / "vae.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a safetensors file or is damaged"):
            cvvae.load(path)

    @pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
    def test_truncated_ckpt(self, kept, tmp_path):
        path = tmp_path / "vae.ckpt"
        torch.save({"state_dict": video_state("v1")}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:int(len(whole) * kept)])
        with pytest.raises(CheckpointError, match="vae.ckpt is truncated or damaged"):
            cvvae.load(path)

    @pytest.mark.parametrize("content", [b"a" * 40, b"\x80\x02X\2\0\0\0\xc1\xc1.", b"\x80\x02u.", b"\x80\x02X\x01"])
    def test_damaged_ckpt(self, content, tmp_path):
        (tmp_path / "vae.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match="vae.ckpt"):
            cvvae.load(tmp_path / "vae.ckpt")

    def test_ckpt_without_a_state_dict(self, tmp_path):
        torch.save([1, 2], tmp_path / "vae.ckpt")
        with pytest.raises(CheckpointError, match="holds a list, expected a state dict"):
            cvvae.load(tmp_path / "vae.ckpt")

    def test_wrong_suffix(self, tmp_path):
        (tmp_path / "vae.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"expected a .safetensors, .*found the suffix '.gguf'"):
            cvvae.load(tmp_path / "vae.gguf")

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No such file: .*nothing.safetensors"):
            cvvae.load(tmp_path / "nothing.safetensors")


class Payload:
    """A pickle that would make a folder if it were executed."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class TestPickleSafety:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_the_payload_does_not_run(self, zipped, tmp_path):
        folder, path = tmp_path / "executed", tmp_path / "vae.ckpt"
        content = {"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}, "extra": Payload(str(folder))}
        if zipped:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(CheckpointError, match="so it was not opened: nothing in it was executed"):
            cvvae.load(path)
        assert not folder.exists()

    def test_the_payload_would_run(self, tmp_path):
        """The test above means something: unpickling plainly does make the folder."""
        pickle.loads(pickle.dumps(Payload(str(tmp_path / "executed"))))
        assert (tmp_path / "executed").exists()


class TestSaving:
    def test_metadata_is_read_back(self, tmp_path):
        vae, path = video_vae("inflated"), tmp_path / "vae.safetensors"
        cvvae.save(vae, path, metadata={"psnr": 31.5, "what": "a demonstration"})
        metadata = read_metadata(path)
        assert metadata["psnr"] == 31.5 and metadata["what"] == "a demonstration"
        assert metadata["config"] == json.loads(json.dumps(vae.config.describe()))

    def test_other_files_have_no_metadata(self, file):
        assert read_metadata(file) == {}

    @pytest.mark.parametrize("before", [None, b"an older file"])
    def test_a_failed_write_leaves_the_name_alone(self, before, tmp_path, monkeypatch):
        def fail(state, path, header):
            with open(path, "wb") as file:
                file.write(b"half of it")
            raise OSError("disk full")

        monkeypatch.setattr(cvvae.checkpoint, "save_file", fail)
        self.check_name_is_left_alone(before, tmp_path / "vae.safetensors")

    @pytest.mark.parametrize("before", [None, b"an older file"])
    def test_the_name_is_given_last(self, before, tmp_path, monkeypatch):
        def fail(partial, path):
            assert read_metadata(partial)  # already whole
            raise OSError("disk full")

        monkeypatch.setattr(cvvae.checkpoint.os, "replace", fail)
        self.check_name_is_left_alone(before, tmp_path / "vae.safetensors")

    @staticmethod
    def check_name_is_left_alone(before, path):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(OSError, match="disk full"):
            cvvae.save(video_vae(), path)
        assert [file.name for file in path.parent.iterdir()] == ([path.name] if before is not None else [])
        assert before is None or path.read_bytes() == before

    def test_a_finished_write_leaves_one_file(self, tmp_path):
        path = tmp_path / "vae.safetensors"
        for _ in range(2):
            cvvae.save(video_vae(), path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


class TestRefusal:
    """By the header alone, what loading would say."""

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("prefix", ["", "first_stage_model."])
    def test_nothing_against_what_loads(self, variant, prefix, tmp_path):
        save_file({prefix + name: tensor for name, tensor in video_state(variant).items()}, tmp_path / "vae.safetensors")
        assert refusal(tmp_path / "vae.safetensors") is None

    def test_group_norms_of_another_size(self, tmp_path):
        cvvae.save(EIGHT_GROUPS, tmp_path / "vae.safetensors")
        assert refusal(tmp_path / "vae.safetensors") is None

    @pytest.mark.parametrize("state, kind", [
        (image_state(LAYOUTS["sd"]), "image VAE"),
        ({"a.lora_up.weight": torch.zeros(1)}, "LoRA"),
        ({"double_blocks.0.weight": torch.zeros(1)}, "diffusion model"),
        ({"encoder.conv1.weight": torch.zeros(1), "decoder.conv1.weight": torch.zeros(1)}, "another VAE"),
        ({"weight": torch.zeros(1)}, "not a CV-VAE"),
        (without("encoder.norm_out.bias"), "not a CV-VAE"),
        (video_state("v1") | {"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int8)}, "not a CV-VAE"),
    ])
    def test_it_says_what_loading_says(self, state, kind, tmp_path):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "vae.safetensors")
        with pytest.raises(CheckpointError) as raised:
            cvvae.load(tmp_path / "vae.safetensors")
        found = refusal(tmp_path / "vae.safetensors")
        assert (str(found), found.kind) == (str(raised.value), kind)

    @pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1", b"12345678{"])
    def test_damage(self, content, tmp_path):
        (tmp_path / "vae.safetensors").write_bytes(content)
        assert refusal(tmp_path / "vae.safetensors").kind == "damaged"

    def test_no_weight_is_read(self, tmp_path):
        """The header of vae3d, 730 MB in float32, before a hole of that size: reading it would take its time."""
        resource = pytest.importorskip("resource")
        shapes, entries, end = video_shapes("v1", (128, 256, 512, 512), 2), {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 4 * math.prod(shape)
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        header = json.dumps(entries).encode()
        path = tmp_path / "vae.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + end)
        assert 725e6 < path.stat().st_size < 735e6
        used = resource.getrusage(resource.RUSAGE_SELF)
        assert refusal(path) is None
        now = resource.getrusage(resource.RUSAGE_SELF)
        assert now.ru_utime + now.ru_stime < used.ru_utime + used.ru_stime + 0.3 and now.ru_maxrss < used.ru_maxrss + 50_000
