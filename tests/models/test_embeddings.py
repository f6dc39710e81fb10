import math

import pytest
import torch

from models.embeddings import LabelEmbedding, TimeEmbedding, batch_times, sinusoids

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
