import pytest
import torch

from benchmarks import gpu, recipe
from benchmarks._timing import require_agreement
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pretrained import PretrainedAutoencoder

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
    assert (size, tried) == (2, [16, 8, 4, 2, 2, 2])


@pytest.mark.slow
def test_the_benchmark_of_gpus_measures_encoding_and_scoring(monkeypatch):
    small = PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8), 4, 32, {}), "small")
    monkeypatch.setattr(gpu, "new_autoencoder", lambda: small)
    text = gpu.run(CPU, ("autoencoder", "scoring"), 0.0)
    assert all(name in text for name in ("encoding, bf16", "decoding, fp32", "Inception features, 64, bf16"))


def test_every_recipe_has_a_run_of_its_own():
    texts = ["a: --time_location 0.5", "b: --time_location -0.5", "c: --time_location 5", "d: --rope", "default"]
    variants = [recipe.Variant.parse(text) for text in texts]
    assert len({recipe.slug(variant.training) for variant in variants}) == len(texts)
    same = recipe.Variant.parse("again: --rope | --num_steps 4")
    assert recipe.slug(same.training) == recipe.slug(variants[3].training)  # sampling flags need no other run
    assert same.sampling == ("--num_steps", "4")


def result(loss, unguided, guided):
    losses = dict.fromkeys(("loss", *recipe.QUARTERS), loss)
    distances = {1.0: unguided, 2.0: guided, 4.0: guided + 1}
    return recipe.Result(losses, 100 * loss, distances, dict.fromkeys(distances, 0.3))


def test_recipes_are_compared_seed_by_seed_at_their_own_best_scale():
    baseline = [result(1.0, 3.0, 2.0), result(2.0, 5.0, 4.0)]
    other = [result(0.5, 2.0, 2.5), result(1.5, 3.0, 4.5)]
    row = recipe.summarize(recipe.Variant("other"), other, baseline)
    assert row["scale"] == 2
    assert (row["loss"]["difference"], row["loss"]["error"]) == (-0.5, 0)
    assert (row["unguided"]["mean"], row["unguided"]["difference"], row["unguided"]["error"]) == (2.5, -1.5, 0.5)
    assert row["guided"]["difference"] == 0.5
    assert row["rate"]["relative"] == pytest.approx((0.5 + 0.75) / 2)
    alone = recipe.summarize(recipe.Variant("other"), other[:1], baseline[:1])
    assert alone["guided"]["error"] == pytest.approx(0.3 * 2**0.5)  # both sides have a finite number of samples
    assert alone["loss"]["error"] is None
