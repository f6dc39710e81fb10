"""The scale of latents follows diffusers, except for files of earlier versions, which keep theirs."""

import json

import diffusers
import pytest
import torch

from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED
from options import UsageError

MEAN, STD = [0.5, -1.0], [2.0, 0.25]
STATISTICS = {"latents_mean": MEAN, "latents_std": STD}


def save(folder, statistics, **edits):
    """A small autoencoder; `edits` are made in its config.json."""
    new_autoencoder_kl(3, (8, 16), 2, 8, statistics).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | edits))
    return load_autoencoder(AutoencoderOptions(str(folder)), 3)


def scale(autoencoder):
    return autoencoder.mean.flatten().tolist(), autoencoder.std.flatten().tolist()


@pytest.mark.parametrize("factor", [0.5, 1.0, 0.13025])
def test_statistics_and_factor_apply_as_in_diffusers_pipelines(factor, tmp_path):
    """StableDiffusionXLPipeline decodes latents * latents_std / scaling_factor + latents_mean."""
    autoencoder = save(tmp_path / "ae", STATISTICS | {"scaling_factor": factor})
    config = diffusers.AutoencoderKL.load_config(tmp_path / "ae")
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(config[name]).view(1, 2, 1, 1) for name in ("latents_mean", "latents_std"))
    decoded = latents * std / config["scaling_factor"] + mean
    torch.testing.assert_close(latents * autoencoder.std + autoencoder.mean, decoded)
    moments = torch.cat([decoded, torch.zeros_like(decoded)], dim=1)
    torch.testing.assert_close(autoencoder.sample(moments), latents, atol=1e-5, rtol=1e-5)


def test_a_file_of_an_earlier_version_keeps_its_scale_with_a_note(tmp_path, capsys):
    """Earlier versions measured the statistics but left diffusers' default factor in config.json."""
    autoencoder = save(tmp_path / "ae", STATISTICS, scaling_factor=0.18215)
    assert scale(autoencoder) == (MEAN, STD)
    assert "set scaling_factor to 1.0" in capsys.readouterr().err


def test_a_new_file_has_factor_one_and_the_same_scale(tmp_path, capsys):
    autoencoder = save(tmp_path / "ae", STATISTICS)
    assert json.loads((tmp_path / "ae" / "config.json").read_text())["scaling_factor"] == 1.0
    assert scale(autoencoder) == (MEAN, STD)
    assert capsys.readouterr().err == ""


def test_diffusers_default_factor_applies_to_the_autoencoders_of_others(tmp_path):
    """Attention in the middle, as in Stable Diffusion's, shows that train_autoencoder.py did not write the file."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=2, norm_num_groups=8, latents_mean=MEAN, latents_std=STD
    ).save_pretrained(tmp_path / "ae")
    autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 3)
    assert scale(autoencoder) == (MEAN, pytest.approx([value / 0.18215 for value in STD]))


def test_the_bundled_autoencoder_keeps_its_latents():
    autoencoder = load_autoencoder(AutoencoderOptions("pretrained/fashion_mnist_autoencoder"), 1)
    assert scale(autoencoder) == (
        pytest.approx([0.009795523, -0.002957322, -0.162676433, -0.007616335]),
        pytest.approx([0.965783765, 0.969862737, 1.020835325, 0.940635032]),
    )


def test_one_number_serves_all_channels(tmp_path):
    autoencoder = save(tmp_path / "ae", {"latents_mean": [0.5], "latents_std": [2.0]})
    latents = autoencoder.sample(torch.ones(1, 4, 2, 2))
    assert torch.equal(latents, torch.full((1, 2, 2, 2), 0.25))


def test_without_any_entry_the_scale_is_to_be_measured(tmp_path):
    facts = save(tmp_path / "ae", STATISTICS, latents_mean=None, scaling_factor=None).describe()
    assert (facts.latents_std, facts.statistics) == ((), UNMEASURED)


@pytest.mark.parametrize(
    "edits",
    [
        {"latents_mean": [0.0, 0.0, 0.0]},
        {"latents_std": [1.0, 0.0]},
        {"latents_std": [1.0, float("nan")]},
        {"latents_mean": 0.5},
        {"latents_mean": None, "scaling_factor": 0},
    ],
)
def test_an_unusable_scale_is_refused(edits, tmp_path):
    with pytest.raises(UsageError, match=r"config.json of the autoencoder .*ae has unusable .* pass --scale_factor"):
        save(tmp_path / "ae", STATISTICS, **edits)
    given = AutoencoderOptions(str(tmp_path / "ae"), scale_factor=4.0)
    assert scale(load_autoencoder(given, 3)) == ([0, 0], [0.25, 0.25])
