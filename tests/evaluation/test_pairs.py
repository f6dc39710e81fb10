import numpy as np
import pytest
import torch

from evaluation.pairs import PixelScores, discriminative_scores, load_lpips, pair_by_name
from evaluation.sources import ImageSource
from options import UsageError


def source(name: str, *names: str) -> ImageSource:
    return ImageSource(name, len(names), lambda index: torch.zeros(3, 1, 1), {}, names)


def test_pairs_are_matched_by_name():
    assert pair_by_name(source("fake", "a", "b/c", "d"), source("real", "d", "a", "b/c")) == [(0, 1), (1, 2), (2, 0)]


def test_unpaired_sets_are_refused_by_name():
    full, many = source("real", "a", "b"), source("real", *(f"{i:02d}" for i in range(14)))
    with pytest.raises(UsageError, match="fake has no image named b$"):
        pair_by_name(source("fake", "a"), full)
    with pytest.raises(UsageError, match="real has no image named c$"):
        pair_by_name(source("fake", "a", "b", "c"), full)
    with pytest.raises(UsageError, match="several images named a$"):
        pair_by_name(source("fake", "a", "a"), full)
    with pytest.raises(UsageError, match="00, .*, 09 and 4 more$"):
        pair_by_name(source("fake"), many)


def test_psnr_and_ssim():
    real = torch.randint(200, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    same, brighter = PixelScores(), PixelScores()
    same.update(real, real)
    for part in real.split(4):
        brighter.update(part + 10, part)
    rounding = 10 * np.log10(255**2 * 12)  # 58.9 dB: even identical images may differ by rounding
    assert same.result() == {"psnr": (pytest.approx(rounding), pytest.approx(0)), "ssim": (1.0, 0.0)}
    assert brighter.result()["psnr"] == pytest.approx((20 * np.log10(255 / 10), 0), abs=1e-9)
    value, error = brighter.result()["ssim"]
    assert 0.9 < value < 1
    assert error > 0
    with pytest.raises(UsageError, match="different sizes"):
        same.update(real[..., :8], real)


def test_discriminative_scores_of_known_sets():
    generator = np.random.default_rng(0)
    real = generator.normal(size=(400, 3))
    apart = discriminative_scores(real + np.array([20, 0, 0]), real)
    assert apart == {"p_ids": 0, "u_ids": 0}
    alike = discriminative_scores(generator.normal(size=(400, 3)), real)
    assert alike["p_ids"] == pytest.approx(0.5, abs=0.08)
    assert alike["u_ids"] == pytest.approx(0.5, abs=0.08)


def test_p_ids_follows_the_pairs():
    """The fakes have the real distribution, but each real partner scores higher. Only the paired score detects this."""
    real = np.random.default_rng(0).normal(size=(400, 1))
    order = real[:, 0].argsort()
    shifted = real.copy()
    shifted[order] = real[np.roll(order, 1)]  # every fake but one is the next value below its partner
    shifted = np.concatenate([shifted - 0.01, np.zeros_like(shifted)], axis=1)
    scores = discriminative_scores(shifted, np.concatenate([real, np.zeros_like(real)], axis=1))
    assert scores["p_ids"] < 0.01
    assert scores["u_ids"] > 0.4


def test_lpips_of_local_weights(tmp_path):
    pytest.importorskip("lpips")
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "alexnet.pth")
    distance = load_lpips(str(tmp_path / "alexnet.pth"), "cpu")
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert distance(a, a).abs().max() == 0
    assert distance(a, b).flatten().shape == (2,)
    assert distance(a, b).min() > 0
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(UsageError, match=r"foreign\.pth"):
        load_lpips(str(tmp_path / "foreign.pth"), "cpu")
