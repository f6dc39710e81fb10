"""Training with --augment: whole runs with cached variants and in pixel space, and samples that show no augmentation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import latent_flow
from checkpoints.conversion import to_published
from checkpoints.files import read_weights
from datasets_prep.augmentation.variants import AugmentedMoments, VariantRecipe, variants_of
from datasets_prep.datasets import DatasetFacts, ImageDataset
from datasets_prep.moments import EncodedImages
from flow.objectives import FlowMatching
from flow.paths import PathOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.conditions import Condition
from models.dit import DiT, DiTOptions
from models.registry import build_network
from models.taps import weights_for_sampling
from runtime.precision import Machine
from runtime.torch_files import read_torch_file
from tests.drawn_batches import draw_batches

TRAIN, INPAINT = "train_flow_latent.py", "train_flow_latent_inpainting.py"
EVERY = ["--augment", "flip", "crop", "color", "--augment_copies", 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("augmentation")
    write_idx(place / "data", {"train": 24, "t10k": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": 0.5}).save_pretrained(place / "ae")
    return place


@pytest.fixture
def train(place, call):
    """`train(exp, flags)` runs a training script; returns the exit code, the printed lines and the run folder."""

    def run(exp, *more, script=TRAIN, folder="latent_flow", autoencoder=place / "ae"):
        flags = [
            "--dataset",
            "fashion_mnist",
            "--datadir",
            place / "data",
            "--pretrained_autoencoder_ckpt",
            autoencoder,
        ]
        flags += ["--model_type", "DiT-Mi/4", "--num_classes", 10, "--label_dropout", 0.1, "--precision", "fp32"]
        flags += ["--batch_size", 8, "--max_steps", 4, "--lr", 1e-2, "--ema_decay", 0.5, "--log_every", 1]
        flags += ["--method", "euler", "--num_steps", 2, "--save_root", place / "saved", "--exp", exp, *more]
        code, out, err = call(script, flags)
        return code, out + err, place / "saved" / folder / "fashion_mnist" / exp

    return run


def newest(folder):
    return max(folder.glob("model_*.safetensors"))


def test_a_run_with_every_augmentation_trains_samples_and_converts(train, place, tmp_path):
    code, printed, folder = train("every", *EVERY)
    assert code == 0, printed
    assert "augment     flip crop color; variants of each image: 2, drawn with probability 0.5" in printed
    assert len(list((place / "data" / "latent_cache").glob("augmented_*/*/manifest.json"))) == 1
    weights, header = read_weights(newest(folder))
    assert header.network.augment == ("flip", "crop", "color")
    assert header.training["augment_copies"] == 2
    assert not header.dataset.flips
    assert weights["augment_embedder.weight"].abs().max() > 0
    images = latent_flow.load(newest(folder)).sample([0, 1], num_steps=2, method="euler")
    assert images.shape[0] == 2
    to_published(newest(folder), tmp_path / "model.pth")
    plain = build_network("DiT-Mi/4", header.latent_size, header.network.for_sampling()).state_dict()
    assert read_torch_file(tmp_path / "model.pth").keys() == plain.keys()
    code, printed, _ = train("every", "--augment", "flip", "crop", "--augment_copies", 2)
    assert code == 2
    assert "--augment was ['flip', 'crop', 'color'], now ['flip', 'crop']" in printed


def test_runs_with_other_seeds_share_the_variants(train, place):
    for seed in (1, 2):
        assert train(f"seed {seed}".replace(" ", ""), "--augment", "crop", "--seed", seed)[0] == 0
    folders = {path.parent.parent for path in (place / "data" / "latent_cache").glob("augmented_*/*/manifest.json")}
    recipe = VariantRecipe(("crop",), 8, mirrored=False)
    assert [path.name for path in folders].count(recipe.name) == 1


@pytest.mark.parametrize("autoencoder", ["ae", "none"])
def test_without_a_chance_of_variants_the_weights_are_the_same_bits(train, place, autoencoder):
    where = "none" if autoencoder == "none" else place / autoencoder
    code, printed, plain = train(f"plain_{autoencoder}", autoencoder=where)
    assert code == 0, printed
    never = [*EVERY, "--augment_probability", 0]
    code, printed, folder = train(f"never_{autoencoder}", *never, autoencoder=where)
    assert code == 0, printed
    weights, expected = read_weights(newest(folder))[0], read_weights(newest(plain))[0]
    assert weights.pop("augment_embedder.weight").count_nonzero() == 0
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert train(f"often_{autoencoder}", *EVERY, autoencoder=where)[0] == 0
    changed = read_weights(newest(plain.with_name(f"often_{autoencoder}")))[0]
    assert not all(torch.equal(changed[name], value) for name, value in expected.items())


def test_augmentation_starts_from_a_plain_checkpoint(train):
    assert train("start", "--max_steps", 1)[0] == 0
    code, printed, _ = train("further", *EVERY, "--init_from", newest(train("start", "--max_steps", 1)[2]))
    assert code == 0, printed
    assert "no match in name and shape: augment_embedder.weight" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--augment", "flip", "--flip", "on"], "--augment flip and --flip on contradict each other"),
        (["--augment", "spin"], "spin"),
        (["--augment_copies", 4], "--augment_copies has no effect without --augment"),
    ],
)
def test_contradictions_are_refused_before_the_work(train, more, message):
    code, printed, folder = train("refused", *more)
    assert code == 2
    assert message in printed
    assert not folder.exists()


def test_inpainting_refuses_augmentation_before_the_work(train):
    code, printed, folder = train("holes", *EVERY, script=INPAINT, folder="latent_flow_inpaint")
    assert code == 2
    assert "--augment flip crop color works for generation only" in printed
    assert not folder.exists()


# The leak test: images that are bright on the left only.

SIDE, COUNT, STEPS, SAMPLES = 8, 24, 140, 48
FACTS = DatasetFacts("left", SIDE, 1, None, False, ())
NETWORK = DiTOptions(1, 1, augment=("flip",))
CPU = torch.device("cpu")


def one_sided_images():
    images = torch.zeros(COUNT, 1, SIDE, SIDE, dtype=torch.uint8)
    images[..., : SIDE // 2] = torch.linspace(150, 255, COUNT).to(torch.uint8)[:, None, None, None]
    return ImageDataset(FACTS, "train", np.zeros(COUNT, int), images.__getitem__, "left")


def sides_of_samples(network, augmentation=None):
    """The share of samples that are brighter on the left, and the mean difference between both sides' pixels."""
    x = torch.randn(SAMPLES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given = Condition(torch.zeros(SAMPLES, dtype=torch.long), augmentation=augmentation)
    with torch.no_grad():
        for t in torch.linspace(1, 0.05, 20):
            x = x - 0.05 * network(t, x, given)
    difference = (x[..., : SIDE // 2] - x[..., SIDE // 2 :]).mean((1, 2, 3))
    return (difference > 0).float().mean().item(), difference.mean().item()


def learn(conditioned):
    """A network trained on images and mirror images alike, which it can tell apart if `conditioned`."""
    dataset, encode = one_sided_images(), PixelSpace(1).encode
    recipe, machine = VariantRecipe(("flip",), 1, mirrored=False), Machine(CPU, "fp32")
    sources = (EncodedImages(each, encode, machine, 1) for each in (dataset, variants_of(dataset, recipe)))
    source, objective = AugmentedMoments(*sources, recipe, 0.5), FlowMatching(PathOptions())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiT(SIDE, 2, 48, 2, 2, NETWORK)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    settings = {"objective": objective, "batch_size": 24, "num_classes": 1, "device": CPU}
    settings |= {"flips": False, "label_dropout": 0.0}
    for batch in draw_batches(source, PixelSpace(1), 0, STEPS, **settings):
        condition = batch.condition if conditioned else batch.condition._replace(augmentation=None)
        optimizer.zero_grad()
        objective.loss(network, batch.data, batch.noise, batch.draws, condition).mean().backward()
        optimizer.step()
    sampled = DiT(SIDE, 2, 48, 2, 2, replace(NETWORK, augment=()))
    sampled.load_state_dict(weights_for_sampling(network.state_dict()))
    return network, sampled


def test_conditioned_mirror_images_never_appear_in_samples():
    """Without the condition, the same network draws both sides, so the images and the training cannot be the reason."""
    network, sampled = learn(conditioned=True)
    share, difference = sides_of_samples(sampled)
    assert share == 1
    assert difference > 1
    share, difference = sides_of_samples(network, torch.ones(SAMPLES, 1))
    assert share == 0
    assert difference < -1
    share, _ = sides_of_samples(learn(conditioned=False)[1])
    assert 0.2 < share < 0.8
