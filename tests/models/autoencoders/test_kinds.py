"""Every class in KINDS encodes and decodes as diffusers does, from a folder in the real format with small random weights."""

import sys
from importlib.util import find_spec

import diffusers
import pytest
import torch
from torch import nn

from models.autoencoders import diffusers_files
from models.autoencoders.kinds import KINDS
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.protocol import UNMEASURED
from options import UsageError

LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
STATISTICS = {"latents_mean": [0.5, -0.5, 0.1, 0.0], "latents_std": [2.0, 1.5, 0.5, 1.0]}
DC = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    **{
        f"{half}_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock") for half in ("encoder", "decoder")
    },
    **{f"{half}_block_out_channels": (8, 16, 16) for half in ("encoder", "decoder")},
    **{f"{half}_layers_per_block": (1, 1, 1) for half in ("encoder", "decoder")},
    **{f"{half}_qkv_multiscales": ((), (5,), (5,)) for half in ("encoder", "decoder")},
    "scaling_factor": 0.41407,
}
TINY = {
    **{f"{half}_block_out_channels": (8, 8, 8) for half in ("encoder", "decoder")},
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "down_block_out_channels": (8, 16, 16),
    "up_block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
}
RAE = {
    "encoder_hidden_size": 64,
    "encoder_patch_size": 14,
    "encoder_num_hidden_layers": 1,
    "encoder_input_size": 28,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "patch_size": 16,
    "latents_mean": [[[0.1]]] * 64,
    "latents_std": [[[1.5]]] * 64,
}
HUNYUAN = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 2,
    "sample_size": 32,
}
KVAE = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)}

# Class, configuration, factor, channels of the latents, source of the scale.
CASES = {
    "Stable Diffusion": ("AutoencoderKL", {**LEVELS, "scaling_factor": 0.18215}, 4, 4, "its scaling_factor 0.18215"),
    "FLUX.1 and SD3": (
        "AutoencoderKL",
        {
            **LEVELS,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        4,
        16,
        "its scaling_factor 0.3611 and shift_factor 0.1159",
    ),
    "FLUX.2": ("AutoencoderKLFlux2", {**LEVELS, "latent_channels": 4}, 8, 16, "its batch statistics"),
    "asymmetric": ("AsymmetricAutoencoderKL", ASYMMETRIC, 4, 4, "its scaling_factor 0.18215"),
    "Stable Video Diffusion": (
        "AutoencoderKLTemporalDecoder",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 32)},
        2,
        4,
        "its scaling_factor 0.18215",
    ),
    "DC-AE": ("AutoencoderDC", DC, 4, 8, "its scaling_factor 0.41407"),
    "RAE": ("AutoencoderRAE", RAE, 16, 64, "statistics inside the autoencoder"),
    "TAESD": ("AutoencoderTiny", TINY, 4, 4, "its scaling_factor 1.0"),
    "VQGAN": (
        "VQModel",
        {**LEVELS, "latent_channels": 4, "vq_embed_dim": 3, "num_vq_embeddings": 16},
        4,
        3,
        "its scaling_factor 0.18215",
    ),
    "Qwen-Image": ("AutoencoderKLQwenImage", VIDEO | STATISTICS, 4, 4, "its latents_mean, latents_std"),
    "Wan": (
        "AutoencoderKLWan",
        VIDEO | STATISTICS | {"scale_factor_spatial": 4},
        4,
        4,
        "its latents_mean, latents_std",
    ),
    "HunyuanImage": ("AutoencoderKLHunyuanImage", HUNYUAN, 2, 16, None),
    "Kandinsky": ("AutoencoderKLKVAE", KVAE, 2, 4, None),
}
IMAGES = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class SmallEncoder(nn.Module):
    """Stands in for the vision transformer of an RAE."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 14, 14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)  # [B, tokens, D]


def build(name):
    torch.manual_seed(0)
    return PretrainedAutoencoder(getattr(diffusers, CASES[name][0])(**CASES[name][1]), name)


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch):
    """A saved network, the folder, and what is expected of it. Without transformers, RAE's encoder is a stand-in."""
    name, config, *expected = CASES[request.param]
    if name == "AutoencoderRAE" and find_spec("transformers") is None:
        rae = sys.modules[diffusers.AutoencoderRAE.__module__]
        monkeypatch.setattr(rae, "_build_encoder", lambda **_: SmallEncoder())
        monkeypatch.setattr(rae, "_ENCODER_FORWARD_FNS", {"dinov2": lambda encoder, x: encoder(x)})
        monkeypatch.setattr(diffusers_files, "find_spec", lambda _: True)
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**config).eval()
    if name == "AutoencoderKLFlux2":
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.5, 2.0)
    network.save_pretrained(tmp_path / "ae", max_shard_size="20KB")
    return name, network, load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 3), *expected


@torch.no_grad()
def reference(name, network):
    """Diffusers' own z and log-variance, the latents as its pipelines compute them, and the images decoded from z."""
    x = (IMAGES / 255.0) if name == "AutoencoderRAE" else images_to_pixels(IMAGES)
    video = name in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
    encoded = network.encode(x[:, :, None] if video else x)
    logvar = None
    if hasattr(encoded, "latent_dist"):
        z, logvar = encoded.latent_dist.mean, encoded.latent_dist.logvar
    else:
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    decoded = network.decode(z, **({"num_frames": 1} if "Temporal" in name else {})).sample
    if video:
        z, logvar, decoded = z[:, :, 0], logvar[:, :, 0], decoded[:, :, 0]
    return z, logvar, 2 * decoded - 1 if name == "AutoencoderRAE" else decoded


def patchify(z):
    """Squares of 2 x 2 positions become channels, as in diffusers' Flux2Pipeline."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def scaled(name, network, z):
    """The latents of diffusers' pipelines."""
    config = network.config
    if name == "AutoencoderKLFlux2":
        std = (network.bn.running_var + config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        return (z - network.bn.running_mean.view(1, -1, 1, 1)) / std
    if name in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (z - mean) / std
    if name in ("AutoencoderRAE", "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE"):
        return z
    return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def test_encoding_sampling_and_decoding_equal_diffusers(case):
    name, network, autoencoder, factor, channels, source = case
    z, logvar, decoded = reference(name, network)
    if name == "AutoencoderKLFlux2":
        z, logvar = patchify(z), patchify(logvar)
    moments = autoencoder.encode(IMAGES)
    expected = z if logvar is None else torch.cat([z, logvar], dim=1)
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)
    latents = autoencoder.sample(moments)
    torch.testing.assert_close(latents, scaled(name, network, z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    assert latents.shape == (2, channels, 32 // factor, 32 // factor)
    assert (autoencoder.factor, autoencoder.latent_channels) == (factor, channels)
    assert autoencoder.moment_channels == moments.shape[1] == expected.shape[1]
    assert autoencoder.has_posterior == (logvar is not None)
    assert (autoencoder.source or None) == source


@pytest.mark.parametrize("name", ["Stable Diffusion", "FLUX.2", "DC-AE", "VQGAN"])
def test_noise_samples_the_posterior_or_changes_nothing(name):
    autoencoder = build(name)
    moments = autoencoder.encode(IMAGES)
    mean = autoencoder.sample(moments)
    one = autoencoder.sample(moments, torch.ones_like(mean))
    if not autoencoder.has_posterior:
        assert torch.equal(one, mean)
        return
    deviation = (0.5 * moments.chunk(2, dim=1)[1]).exp() / autoencoder.std
    torch.testing.assert_close(one - mean, deviation, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["FLUX.2", "DC-AE", "TAESD", "VQGAN", "asymmetric"])
def test_only_known_decoders_have_a_lipschitz_bound(name):
    bound = build(name).lipschitz_bound(4)
    assert (bound is not None) == (name == "FLUX.2")
    assert bound is None or bound > 0


def test_facts_are_printed(tmp_path, capsys):
    torch.manual_seed(0)
    diffusers.AutoencoderDC(**DC).save_pretrained(tmp_path / "dc")
    capsys.readouterr()
    autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path / "dc")), 3)
    count = sum(value.numel() for value in autoencoder.network.parameters())
    printed = " ".join(capsys.readouterr().out.split())
    assert printed == (
        f"autoencoder {tmp_path}/dc: AutoencoderDC, factor 4, 8 channels, images in [-1, 1], deterministic, scale: its "
        f"scaling_factor 0.41407; {count / 1e6:.3g} million parameters, {4 * count / 1e6:.3g} MB"
    )


def test_the_table_is_covered():
    assert {name for name, *_ in CASES.values()} == set(KINDS)


def test_an_autoencoder_without_a_scale_is_to_be_measured(tmp_path):
    diffusers.AutoencoderKLHunyuanImage(**HUNYUAN).save_pretrained(tmp_path / "ae")
    facts = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 3).describe()
    assert (facts.latents_mean, facts.latents_std, facts.statistics) == ((), (), UNMEASURED)
    known = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae"), scale_factor=0.5), 3).describe()
    assert (known.latents_std, known.statistics) == ((2.0,) * 16, "")


def test_an_rae_takes_one_size_of_images(monkeypatch, tmp_path):
    rae = sys.modules[diffusers.AutoencoderRAE.__module__]
    monkeypatch.setattr(rae, "_build_encoder", lambda **_: SmallEncoder())
    monkeypatch.setattr(diffusers_files, "find_spec", lambda _: True)
    diffusers.AutoencoderRAE(**RAE).save_pretrained(tmp_path / "rae")
    autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path / "rae")), 3)
    with pytest.raises(UsageError, match=r"the image size must be 32 for .*rae, but the images have 64 x 64 pixels"):
        autoencoder.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_missing_software_is_named(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    monkeypatch.setattr(diffusers_files, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="AutoencoderRAE needs the package transformers, .*: pip install transformers"):
        load_autoencoder(AutoencoderOptions(str(tmp_path)), 3)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    monkeypatch.setattr(diffusers_files, "diffusers", Older)
    with pytest.raises(UsageError, match=r"diffusers 0.31.0 has no AutoencoderDC: pip install --upgrade diffusers"):
        load_autoencoder(AutoencoderOptions(str(tmp_path)), 3)


class Older:
    """An older diffusers with one autoencoder."""

    __version__ = "0.31.0"
    AutoencoderKL = diffusers.AutoencoderKL


def test_the_autoencoder_of_a_pipeline_on_the_hub_is_found(tmp_path, monkeypatch):
    """Its config.json is in the subfolder vae, and the repository has none of its own."""
    diffusers.AutoencoderTiny(**TINY).save_pretrained(tmp_path / "vae")
    load_config = diffusers.AutoencoderKL.load_config
    from_pretrained = diffusers.AutoencoderTiny.from_pretrained
    asked = []

    def local(read):
        def call(name, local_files_only=False, subfolder="", **settings):
            asked.append((name, subfolder))
            return read(tmp_path, local_files_only=True, subfolder=subfolder, **settings)

        return call

    monkeypatch.setattr(diffusers_files, "check_hub", lambda name: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", local(load_config))
    monkeypatch.setattr(diffusers.AutoencoderTiny, "from_pretrained", local(from_pretrained))
    loaded = load_autoencoder(AutoencoderOptions("owner/name"), 3)
    assert loaded.class_name == "AutoencoderTiny"
    assert asked == [("owner/name", ""), ("owner/name", "vae"), ("owner/name", "vae")]


def test_the_autoencoder_of_a_pipeline_is_found(tmp_path):
    folder = tmp_path / "pipeline"
    diffusers.AutoencoderTiny(**TINY).save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text("{}")
    assert load_autoencoder(AutoencoderOptions(str(folder)), 3).sha256 == (
        load_autoencoder(AutoencoderOptions(str(folder / "vae")), 3).sha256
    )
