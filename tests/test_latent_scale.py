"""Training with an autoencoder without a scale: measured once, kept in cache and header, and used by sampling."""

import json

import pytest
import torch
from PIL import Image

from checkpoints.files import load_model, read_header, read_weights, save_weights
from datasets_prep import moments
from datasets_prep.datasets import DatasetOptions, open_dataset
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED, AutoencoderFacts
from options import UsageError

TRAIN, TEST = "train_flow_latent.py", "test_flow_latent.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("latent_scale")
    write_idx(place / "data", {"train": 64, "t10k": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, scale in {"ae": None, "scaled": 0.5}.items():
            torch.manual_seed(0)
            new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": scale}).save_pretrained(place / name)
    return place


@pytest.fixture
def train(place, call):
    """Runs two training steps; returns the printed lines and the folder."""

    def run(exp, *more, autoencoder="ae", succeeds=True):
        flags = ["--dataset", "fashion_mnist", "--datadir", place / "data"]
        flags += ["--pretrained_autoencoder_ckpt", place / autoencoder, "--model_type", "DiT-Mi/4", "--num_classes", 10]
        flags += ["--precision", "fp32", "--batch_size", 16, "--max_steps", 2, "--method", "euler", "--num_steps", 2]
        code, out, err = call(TRAIN, [*flags, "--save_root", place / "saved", "--exp", exp, *more])
        assert (code == 0) == succeeds, err
        return out + err, place / "saved" / "latent_flow" / "fashion_mnist" / exp

    return run


def manifest_of(place):
    """The manifest of the training images' cache, encoded by the autoencoder without a scale."""
    return next((place / "data").glob("**/*_train_*/manifest.json"))


def facts_of(folder):
    return read_header(folder / "model_1.safetensors").autoencoder


def test_the_scale_is_measured_kept_and_used(place, train, call, monkeypatch):
    printed, folder = train("measured")
    assert "scale to be measured" in printed
    assert "latents     measured mean" in printed
    facts = facts_of(folder)
    assert facts.statistics == "measured"
    stored = json.loads(manifest_of(place).read_text())["latent_statistics"]
    assert stored["mean"] == pytest.approx(facts.latents_mean, rel=1e-6)
    assert stored["std"] == pytest.approx(facts.latents_std, rel=1e-6)

    autoencoder = load_model(folder / "model_1.safetensors").autoencoder
    images = open_dataset(DatasetOptions("fashion_mnist", str(place / "data"), image_size=32), "train")
    encoded = autoencoder.encode(torch.stack([images[i] for i in range(64)]))
    noise = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.sample(encoded, noise)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.1)

    monkeypatch.setattr(moments, "measure_statistics", lambda *_: pytest.fail("measured again"))
    _, again = train("again")
    assert facts_of(again) == facts
    weights = [read_weights(each / "model_1.safetensors")[0] for each in (folder, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    flags = ["--checkpoint", folder / "model_1.safetensors", "--n_sample", 2, "--device", "cpu", "--method", "euler"]
    code, out, err = call(TEST, [*flags, "--num_steps", 1, "--save_images", "png", "--output_dir", place / "samples"])
    assert code == 0, err
    assert "scale: measured" in " ".join(out.split())


def test_a_resumed_run_keeps_its_scale(place, train):
    _, folder = train("resumed")
    facts = facts_of(folder)
    path = manifest_of(place)
    manifest = json.loads(path.read_text())
    changed = {"mean": [0.0, 0.0], "std": [9.0, 9.0]}
    path.write_text(json.dumps(manifest | {"latent_statistics": changed}))
    train("resumed", "--max_steps", 8, "--resume")
    path.write_text(json.dumps(manifest))
    header = read_header(sorted(folder.glob("model_*.safetensors"))[-1])
    assert (header.autoencoder, header.step) == (facts, 8)


def test_a_run_takes_over_the_scale_of_its_initial_checkpoint(place, train):
    _, first = train("measured_first")
    header = read_header(first / "model_1.safetensors")
    weights, _ = read_weights(first / "model_1.safetensors")
    ours = AutoencoderFacts(header.autoencoder.id, header.autoencoder.sha256, None, (1.0, 2.0), (3.0, 4.0), "stats.pt")
    save_weights(place / "other.safetensors", weights, type(header)(**{**vars(header), "autoencoder": ours}))
    printed, folder = train("continued", "--init_from", place / "other.safetensors")
    assert facts_of(folder) == ours
    assert "learned latents with the mean" not in printed


def test_statistics_of_a_file_are_recorded(place, train):
    torch.save({"mean": torch.tensor([0.5, 0.0]), "std": torch.tensor([2.0, 3.0])}, place / "stats.pt")
    _, folder = train("file", "--latent_statistics", place / "stats.pt", autoencoder="scaled")
    facts = facts_of(folder)
    assert (facts.latents_mean, facts.latents_std, facts.statistics) == ((0.5, 0.0), (2.0, 3.0), "stats.pt")
    assert load_model(folder / "model_1.safetensors").autoencoder.describe() == facts


def test_a_checkpoint_without_a_scale_needs_statistics(place, train):
    _, folder = train("measured_last")
    weights, header = read_weights(folder / "model_1.safetensors")
    unknown = AutoencoderFacts(header.autoencoder.id, header.autoencoder.sha256, statistics=UNMEASURED)
    path = place / "unknown.safetensors"
    save_weights(path, weights, type(header)(**{**vars(header), "autoencoder": unknown}))
    with pytest.raises(UsageError, match="does not record the scale of its latents, .* with --latent_statistics FILE"):
        load_model(path)
    torch.save({"mean": torch.tensor([0.5, 0.0]), "std": torch.tensor([2.0, 3.0])}, place / "given.pt")
    given = AutoencoderOptions(str(place / "ae"), latent_statistics=str(place / "given.pt"))
    assert load_model(path, autoencoder=given).autoencoder.describe().latents_std == (2.0, 3.0)


def test_a_twin_draws_the_grids(place, train):
    """The same autoencoder in another scale is a twin, so grids are equal; its decoder's bias shows that it draws them."""
    network = new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": 0.5})
    network.load_state_dict(load_autoencoder(AutoencoderOptions(str(place / "scaled")), 1).network.state_dict())
    with torch.no_grad():
        network.decoder.conv_out.bias += 10
    network.save_pretrained(place / "white")
    grids = {}
    for exp, more in {"own": (), "twin": ("scaled",), "white": ("white",)}.items():
        flags = [flag for name in more for flag in ("--preview_autoencoder", place / name)]
        _, folder = train(exp, *flags, "--grid_samples", 4, "--plot_every", 1, autoencoder="scaled")
        grids[exp] = Image.open(sorted(folder.glob("samples/*.png"))[-1]).convert("L").getextrema(), folder
    assert grids["own"][0] == grids["twin"][0] != grids["white"][0]
    assert grids["white"][0][1] == 255
    weights = [read_weights(folder / "model_1.safetensors")[0] for _, folder in grids.values()]
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_a_twin_of_another_shape_is_refused_before_training(place, train):
    new_autoencoder_kl(1, (8, 8), 2, 32, {}).save_pretrained(place / "small")
    printed, folder = train("refused", "--preview_autoencoder", place / "small", succeeds=False)
    assert "choose a twin of the run's autoencoder" in " ".join(printed.split())
    assert not folder.exists()
