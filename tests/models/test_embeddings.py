import math
from dataclasses import replace

import pytest
import torch

from models.conditions import Condition
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.embeddings import LabelEmbedding, TimeEmbedding, TimeFeatures, batch_times, sinusoids
from models.registry import NETWORKS, build_network
from options import UsageError
from tests.small_networks import SMALL, new_network

VALUES = torch.tensor([0.0, 0.37, 1.0, 250.0], dtype=torch.float64)


@pytest.mark.parametrize("endpoint", [False, True])
def test_sinusoidal_embeddings_follow_the_formula(endpoint):
    count = 5
    waves = sinusoids(VALUES, count, endpoint=endpoint)
    assert waves.shape == (4, 2 * count)
    for row, value in zip(waves.tolist(), VALUES.tolist(), strict=True):
        for i in range(count):
            angle = value * 10000 ** (-i / (count - 1 if endpoint else count))
            assert row[i] == pytest.approx(math.cos(angle), abs=1e-12)
            assert row[count + i] == pytest.approx(math.sin(angle), abs=1e-12)


def test_sines_first_only_swaps_the_halves():
    assert torch.equal(sinusoids(VALUES, 7, sines_first=True), sinusoids(VALUES, 7).roll(7, dims=1))


def test_sinusoidal_embeddings_keep_the_inputs_precision():
    assert sinusoids(VALUES.float(), 3).dtype == torch.float32
    torch.testing.assert_close(sinusoids(VALUES.float()[:3], 3).double(), sinusoids(VALUES[:3], 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sines_first", [False, True])
def test_time_embedding_is_two_linear_layers_on_the_waves(sines_first):
    torch.manual_seed(0)
    embedding = TimeEmbedding(4, 6, sines_first=sines_first)
    assert list(embedding.state_dict()) == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    t = torch.tensor([0.0, 0.4, 1.0])
    first, _, second = embedding.mlp
    hidden = sinusoids(t, 4, sines_first=sines_first) @ first.weight.T + first.bias
    torch.testing.assert_close(embedding(t), hidden * hidden.sigmoid() @ second.weight.T + second.bias)


def test_fourier_features_follow_the_formula_with_fixed_frequencies():
    torch.manual_seed(1)
    features, others = TimeFeatures(5, "fourier", 3.0), TimeFeatures(5, "fourier")
    assert torch.equal(features.W, others.W)  # no seed of a run changes them
    assert not features.W.requires_grad
    t = torch.tensor([0.0, 0.3])
    for row, value in zip(features(t).tolist(), t.tolist(), strict=True):
        angles = [2 * math.pi * 3 * value * frequency for frequency in features.W.tolist()]
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=1e-5)
    many = TimeFeatures(4096, "fourier").W
    assert abs(many.mean()) < 0.05
    assert abs(many.std() - 1) < 0.05


def test_a_factor_multiplies_the_times():
    t = torch.rand(7)
    assert torch.equal(TimeFeatures(5, factor=100.0)(t), sinusoids(100 * t, 5))
    assert torch.equal(TimeFeatures(5)(t), sinusoids(t, 5))


def directions(kind, factor):
    """How many principal components hold 99.9 % of the variance of the features of uniform times."""
    with torch.no_grad():
        features = TimeFeatures(128, kind, factor)(torch.linspace(0, 1, 2000)).double()
    shares = torch.linalg.svdvals(features - features.mean(0)).square().cumsum(0)
    return int((shares < 0.999 * shares[-1]).sum()) + 1


def test_plain_sinusoids_hardly_tell_times_apart():
    """Issues in six repositories, such as SiT's 24: the features of times in [0, 1] lie near one line."""
    found = [directions("sinusoids", factor) for factor in (1.0, 10.0, 100.0)] + [directions("fourier", 1.0)]
    assert found[0] == 2
    assert found[0] < found[1] < found[2]
    assert found[3] > 5


@pytest.mark.parametrize("model_type", SMALL)
def test_a_network_with_a_factor_is_the_plain_network_at_other_times(model_type):
    plain = new_network(model_type, SMALL[model_type])
    scaled = new_network(model_type, replace(SMALL[model_type], time_scale_factor=0.25))
    t, x, condition = torch.tensor([0.4, 0.8]), torch.randn(2, 3, 8, 8), Condition(torch.tensor([0, 1]))
    assert torch.equal(scaled(t, x, condition), plain(0.25 * t, x, condition))
    assert not torch.allclose(scaled(t, x, condition), plain(t, x, condition), atol=1e-3)


@pytest.mark.parametrize("model_type", [name for name in SMALL if name != "ncsn++"])
def test_fourier_features_add_their_frequencies_to_the_state_dict(model_type):
    plain, network = (
        new_network(model_type, options)
        for options in (SMALL[model_type], replace(SMALL[model_type], time_embedding="fourier"))
    )
    (added,) = set(network.state_dict()) - set(plain.state_dict())
    assert added.endswith(".W")
    x = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    first, second = network(torch.tensor([0.1, 0.9]), x, Condition(torch.tensor([1, 1])))
    assert (first - second).abs().max() > 1e-3


def test_ncsnpp_has_its_own_fourier_features():
    with pytest.raises(UsageError, match="--time_embedding fourier has no effect on ncsn"):
        build_network("ncsn++", 8, replace(SMALL["ncsn++"], time_embedding="fourier"))


def test_fourier_features_survive_the_meta_device():
    with torch.device("meta"):
        network = NETWORKS["DiT-Mi/2"].build(8, DiTOptions(time_embedding="fourier"))
        unet = NETWORKS["adm"].build(8, EdmUNetOptions(nf=32, ch_mult=(1,), time_embedding="fourier"))
    assert network.t_embedder.W.device.type == unet.time_features.W.device.type == "meta"


def test_a_missing_label_is_the_last_row():
    embedding = LabelEmbedding(4, 3)
    rows = embedding.embedding_table.weight
    assert torch.equal(embedding(None), rows[3])
    assert torch.equal(embedding(torch.tensor([2, 0])), rows[[2, 0]])


@pytest.mark.parametrize(
    ("given", "latents", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_times_have_the_latents_precision_but_at_least_float32(given, latents, expected):
    x = torch.zeros(3, 1, 2, 2, dtype=latents)
    for t in (torch.tensor(0.5, dtype=given), torch.full((3,), 0.5, dtype=given)):
        times = batch_times(t, x)
        assert times.dtype == expected
        assert times.tolist() == [0.5, 0.5, 0.5]
