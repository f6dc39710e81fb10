"""Files of the latent diffusion code: the golden case, wrappers, and weights that are missing or unexpected."""

import json
import sys
from types import ModuleType

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.autoencoders.coding import encode_pixels
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED
from options import UsageError
from tests.golden.fill_weights import fill_weight

CASE = "tests/golden/autoencoders/ldm_autoencoder.safetensors"


def golden_weights(file):
    """The weights of an open golden case by name."""
    listed = json.loads(file.metadata()["weights"])
    return {name: torch.from_numpy(fill_weight(name, tuple(shape))) for name, shape in listed}


@pytest.fixture(scope="module")
def golden():
    """The golden case's weights by name, and its tensors."""
    with safe_open(CASE, framework="pt") as file:
        return golden_weights(file), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load(path, **settings):
    return load_autoencoder(AutoencoderOptions(str(path), **settings), 3)


def test_the_golden_case_agrees(golden, tmp_path):
    """VA-VAE's file has training's weights next to the autoencoder's."""
    weights, tensors = golden
    others = {"loss.discriminator.weight": torch.ones(2), "foundation_model.blocks.0.weight": torch.ones(2)}
    torch.save({"state_dict": weights | others, "epoch": 3}, tmp_path / "vavae.pt")
    autoencoder = load(tmp_path / "vavae.pt")
    images = ((tensors["in.pixels"] + 1) * 127.5).round().byte()
    assert autoencoder.encode(images).shape == tensors["out.moments"].shape
    with torch.no_grad():
        moments = encode_pixels(autoencoder.network, tensors["in.pixels"])  # not rounded to images
    torch.testing.assert_close(moments, tensors["out.moments"], atol=1e-4, rtol=0)
    decoded = autoencoder.decode(tensors["out.moments"].chunk(2, dim=1)[0])
    torch.testing.assert_close(decoded, tensors["out.decoded_mean"], atol=1e-4, rtol=0)
    assert (autoencoder.class_name, autoencoder.factor, autoencoder.latent_channels) == ("AutoencoderKL", 4, 6)
    assert autoencoder.describe().statistics == UNMEASURED


@pytest.mark.parametrize("prefix", ["first_stage_model.", "module.", "ema."])
def test_prefixes_and_containers_change_nothing(golden, tmp_path, prefix):
    weights, _ = golden
    save_file(weights, tmp_path / "plain.safetensors")
    whole = {prefix + name: value for name, value in weights.items()} | {"model.diffusion_model.x": torch.ones(1)}
    torch.save({"state_dict": whole, "global_step": 5}, tmp_path / "whole.ckpt")
    assert load(tmp_path / "whole.ckpt").sha256 == load(tmp_path / "plain.safetensors").sha256


def test_objects_of_lightning_are_passed_over(golden, tmp_path, monkeypatch):
    """Stable Diffusion's first files have a class of Lightning as a key."""
    module = ModuleType("pytorch_lightning")
    module.Checkpoint = type("Checkpoint", (), {"__module__": "pytorch_lightning"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", module)
        torch.save({"state_dict": golden[0], "callbacks": {module.Checkpoint: {"best": 1.0}}}, tmp_path / "sd.ckpt")
    save_file(golden[0], tmp_path / "plain.safetensors")
    assert load(tmp_path / "sd.ckpt").sha256 == load(tmp_path / "plain.safetensors").sha256


def test_a_models_scale_is_used(golden, tmp_path):
    weights, _ = golden
    whole = {f"first_stage_model.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": whole | {"scale_factor": torch.tensor(0.25)}}, tmp_path / "whole.ckpt")
    facts = load(tmp_path / "whole.ckpt").describe()
    assert (facts.latents_std, facts.statistics) == ((4.0,) * 6, "")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"decoder.up.0.block.1.conv1.weight": None}, "missing: decoder.up_blocks.2.resnets.1.conv1.weight"),
        ({"encoder.down.1.block.0.conv2.weight": None}, "incomplete; missing: encoder.down.1.block.0.conv2.weight"),
        ({"encoder.mid.attn_2.q.weight": torch.ones(2)}, "unexpected: encoder.mid.attn_2.q.weight"),
        ({"quant_conv.bias": torch.ones(5)}, r"wrong shape: quant_conv.bias \(5 in the file, 12 in the network\)"),
        ({"quant_conv.bias": torch.full((12,), torch.nan)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(golden, tmp_path, edit, named):
    weights = {name: value for name, value in (golden[0] | edit).items() if value is not None}
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(UsageError, match=named) as raised:
        load(tmp_path / "vae.safetensors")
    assert "vae.safetensors" in str(raised.value)


def to_ldm(name, levels):
    """The latent diffusion code's name of a weight of diffusers."""
    for ours, theirs in [
        ("encoder.down_blocks.", "encoder.down."),
        *((f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.") for i in range(levels)),
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.", "mid.attn_1."),
        (".resnets.", ".block."),
        (".attentions.", ".attn."),
        ("samplers.0.", "sample."),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        *((f"to_{part}.", f"{part}.") for part in "qkv"),
    ]:
        name = name.replace(ours, theirs)
    return name


def test_a_vqgan_becomes_a_vqmodel(tmp_path):
    torch.manual_seed(0)
    network = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        vq_embed_dim=2,
        num_vq_embeddings=8,
    )
    weights = {to_ldm(name, 2): value for name, value in network.state_dict().items()}
    weights = {n: v[..., None, None] if "attn" in n and v.dim() == 2 else v for n, v in weights.items()}
    save_file(weights, tmp_path / "vq.safetensors")
    loaded = load(tmp_path / "vq.safetensors")
    assert loaded.class_name == "VQModel"
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value), name
