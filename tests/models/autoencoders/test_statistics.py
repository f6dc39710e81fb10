"""Measured statistics give latents unit scale, and files of statistics are read as LightningDiT writes them."""

import pytest
import torch
from safetensors.torch import save_file

from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED, AutoencoderFacts
from models.autoencoders.statistics import inherit_scale, measure_statistics
from options import UsageError

MEAN, STD = torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.5])


def draws(count):
    z = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z * STD.view(1, 2, 1, 1) + MEAN.view(1, 2, 1, 1)


def test_latents_have_their_own_mean_and_deviation():
    z = draws(300)
    mean, std, _ = measure_statistics(z.split(100), has_posterior=False)
    assert mean == pytest.approx(z.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert std == pytest.approx(z.std((0, 2, 3), correction=0).tolist(), rel=1e-9)


def test_the_posteriors_variance_counts():
    z = draws(300)
    moments = torch.cat([z, torch.full_like(z, 9.0).log()], dim=1)
    mean, std, _ = measure_statistics([moments], has_posterior=True)
    expected = (z.var((0, 2, 3), correction=0) + 9).sqrt()
    assert mean == pytest.approx(z.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert std == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("has_posterior", [False, True])
def test_a_constant_channel_has_no_deviation(has_posterior):
    """The mean square of a constant is above or below the squared mean, by rounding."""
    varied = draws(30)[:, :1]
    for value in (0.0, 0.1, -0.3, 0.7, 1.1, 1.7, 9.9, 123.4, -1e4):
        z = torch.cat([varied, torch.full_like(varied, value)], dim=1)
        moments = torch.cat([z, torch.full_like(z, -30.0)], dim=1) if has_posterior else z
        std = measure_statistics(moments.split(7), has_posterior).std
        assert std == pytest.approx((varied.std().item(), 0), rel=1e-3, abs=0), value


@pytest.fixture
def folder(tmp_path):
    new_autoencoder_kl(1, (8, 8), 2, 8, {"scaling_factor": 0.5}).save_pretrained(tmp_path / "ae")
    return tmp_path / "ae"


def load(name, **settings):
    return load_autoencoder(AutoencoderOptions(str(name), **settings), 1)


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["pt", "safetensors"])
def test_a_file_of_statistics_replaces_the_scale(folder, tmp_path, save):
    shape = (1, 2, 1, 1)
    save({"mean": MEAN.view(shape), "std": STD.view(shape)}, str(tmp_path / "latents_stats.pt"))
    autoencoder = load(folder, latent_statistics=str(tmp_path / "latents_stats.pt"))
    assert autoencoder.describe() == AutoencoderFacts(
        str(folder), autoencoder.sha256, None, (1.0, -3.0), (2.0, 0.5), "latents_stats.pt"
    )
    z = draws(1).float()
    moments = torch.cat([z, z], dim=1)
    torch.testing.assert_close(autoencoder.sample(moments), (z - MEAN.view(shape)) / STD.view(shape))


def test_a_factor_multiplies_a_files_statistics(folder, tmp_path):
    """LightningDiT's latents are (z - mean) / std times its latent_multiplier."""
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "latents_stats.pt")
    autoencoder = load(folder, latent_statistics=str(tmp_path / "latents_stats.pt"), scale_factor=0.25)
    z = draws(1).float()
    expected = (z - MEAN.view(1, 2, 1, 1)) / STD.view(1, 2, 1, 1) * 0.25
    torch.testing.assert_close(autoencoder.sample(torch.cat([z, z], dim=1)), expected)
    facts = autoencoder.describe()
    assert (facts.scale_factor, facts.latents_std, facts.statistics) == (0.25, (8.0, 2.0), "latents_stats.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"mean": torch.zeros(3), "std": torch.ones(3)}, r"found \[\[3\], \[3\]\]"),
        ({"mean": torch.zeros(2), "std": torch.tensor([1.0, 0.0])}, "a positive std"),
        ({"mean": torch.zeros(2), "std": torch.tensor([1.0, torch.nan])}, "finite"),
        ({"mean": torch.zeros(2)}, r"found \[\[2\]\]"),
        (torch.zeros(2), "found none"),
    ],
)
def test_other_files_are_refused(folder, tmp_path, content, found):
    torch.save(content, tmp_path / "stats.pt")
    with pytest.raises(UsageError, match=f"stats.pt: .*{found}"):
        load(folder, latent_statistics=str(tmp_path / "stats.pt"))


def test_contradicting_flags_are_refused(folder):
    with pytest.raises(UsageError, match="--latent_statistics measured and --scale_factor both set the scale"):
        load(folder, latent_statistics="measured", scale_factor=0.5)
    with pytest.raises(UsageError, match="the latents of none have a fixed scale"):
        load("none", latent_statistics="measured")
    with pytest.raises(UsageError, match="expected `measured`, or a file"):
        load(folder, latent_statistics="mesured")


def test_only_an_unknown_scale_is_inherited_and_only_from_the_same_weights(folder):
    known, unknown = load(folder), load(folder, latent_statistics="measured")
    assert unknown.describe().statistics == UNMEASURED
    record = AutoencoderFacts("moved", known.sha256, None, (1.0, 2.0), (3.0, 4.0), "measured")
    inherit_scale(unknown, AutoencoderFacts("other", "abc", None, (1.0, 2.0), (3.0, 4.0)))
    assert unknown.describe().statistics == UNMEASURED
    for autoencoder in (known, unknown):
        inherit_scale(autoencoder, record)
    assert known.describe().latents_std == (2.0, 2.0)
    assert unknown.describe().latents_std == (3.0, 4.0)
    assert unknown.describe().statistics == "measured"


def test_the_facts_survive_json():
    for facts in (
        AutoencoderFacts("a", "b", None, (1.0,), (2.0,), "measured"),
        AutoencoderFacts("a", "b", statistics=UNMEASURED),
    ):
        assert AutoencoderFacts.from_json(facts.to_json()) == facts
    assert "statistics" not in AutoencoderFacts("a", "b", None, (1.0,), (2.0,)).to_json()
