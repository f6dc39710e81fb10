import pytest
import torch

from benchmarks import gpu
from benchmarks._timing import require_agreement
from models.autoencoders.kl import KLAutoencoder, new_autoencoder_kl

EXPECTED = {"loss": [2.0], "change": [3.0, -4.0]}
TOLERANCES = {"loss": 0.01, "change": 0.05}


def agree(**results):
    require_agreement("side", EXPECTED | results, EXPECTED, TOLERANCES)


def test_variants_with_equal_results_are_accepted():
    agree()
    agree(loss=[2.019], change=[3.0, -4.24])


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"loss": [2.03]}, "side: loss must be within 1 %"),
        ({"change": [-3.0, 4.0]}, "side: change must be within 5 %"),
        ({"change": [3.0, -4.3]}, "side: change must be within 5 %"),
        ({"loss": [float("nan")]}, "side: loss must be within 1 %"),
    ],
)
def test_a_variant_with_different_results_is_refused(results, message):
    with pytest.raises(SystemExit, match=message):
        agree(**results)


CPU = torch.device("cpu")


def test_the_benchmark_of_gpus_measures_training_and_sampling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, options: network)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    text = gpu.run(CPU, ("training", "sampling"), 0.0)
    assert "| DiT-Mi/2 | 4 |" in text
    assert "| adm | 4 |" in text
    assert "| DiT-Mi/2, guided, Heun, 2 steps, bf16 | 2 |" in text
    assert f"torch {torch.__version__}" in text


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def make(case):
        def step():
            tried.append(case.batch_size)
            if case.batch_size > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return step

    _, size = gpu.fitting(gpu.CPU.sampled._replace(batch_size=16), make, CPU)
    assert (size, tried) == (2, [16, 8, 4, 2])


@pytest.mark.slow
def test_the_benchmark_of_gpus_measures_encoding_and_scoring(monkeypatch):
    small = KLAutoencoder(new_autoencoder_kl(3, (8, 8), 4, 32, {}), "small")
    monkeypatch.setattr(gpu, "new_autoencoder", lambda: small)
    text = gpu.run(CPU, ("autoencoder", "scoring"), 0.0)
    assert all(name in text for name in ("encoding, bf16", "decoding, fp32", "Inception features, 64, bf16"))
