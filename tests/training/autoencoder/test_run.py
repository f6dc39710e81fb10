import dataclasses
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from models.autoencoders.loading import AutoencoderOptions, load_autoencoder, load_pretrained
from models.autoencoders.pixels import images_to_pixels
from options import DivergedError, UsageError
from runtime.pictures import read_sheet
from runtime.torch_files import read_torch_file
from tests.training.autoencoder.small_images import TINY_DC, blobs, dataset_of, stop_after, train
from training.autoencoder import run as module
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.state import AutoencoderState

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(folder):
    return load_file(folder / WEIGHTS)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def equal_states(first, second):
    """Whether two contents of content.pth are alike, except for the time."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            name == "seconds" or equal_states(value, second[name]) for name, value in first.items()
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal_states, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def lines(folder, kind):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == kind]


def error_of(folder, images):
    """The squared error of reconstructions, relative to the best constant image's."""
    autoencoder = load_pretrained(str(folder))
    restored = autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))
    pixels = images_to_pixels(images)
    return ((restored - pixels).square().mean() / (pixels - pixels.mean(0)).square().mean()).item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_to_reconstruct(optimizer, tmp_path):
    images = blobs(128)
    result = train(
        tmp_path / "ae", dataset_of(images), max_steps=80, lr=1e-2, muon_lr=0.02, ema_decay=0.8, optimizer=optimizer
    )
    assert result.complete
    assert error_of(result.folder, images) < 1 / 4
    assert result.validation["psnr_db"] > 12


def test_a_deterministic_autoencoder_is_trained_and_loads_in_diffusers(tmp_path):
    images = blobs(128, channels=3)
    options = TINY_DC | {"max_steps": 100, "ema_decay": 0.9, "lr": 5e-3, "standardize_weight": 1e-3}
    folder = train(tmp_path / "ae", dataset_of(images), dataset_of(images[:20]), architecture="dc", **options).folder
    assert error_of(folder, images) < 1 / 4
    network = diffusers.AutoencoderDC.from_pretrained(folder)
    assert network.config.encoder_layers_per_block[0] == 0
    autoencoder = load_autoencoder(AutoencoderOptions(str(folder)), 3)
    latents = autoencoder.sample(autoencoder.encode(images))
    assert latents.mean((0, 2, 3)).abs().max() < 0.01
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"latent_noise": 0.1, "equivariance": 0.5, "augment": ("flip", "crop", "color")},
        {"optimizer": "muon", "architecture": "dc", **TINY_DC},
    ],
    ids=["kl", "dc"],
)
def test_an_interrupted_run_resumes_exactly(options, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", **options | {"max_steps": 7, "log_every": 5})
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        first = train(tmp_path / "parts", **options | {"max_steps": 7, "log_every": 5})
    assert not first.complete
    assert not (tmp_path / "parts").exists()
    assert load_pretrained(str(first.folder)).latent_channels == 2  # the newest weights
    second = train(tmp_path / "parts", **options | {"max_steps": 7, "log_every": 5})
    assert second.complete
    assert same(weights(whole.folder), weights(second.folder))
    contents = [read_torch_file(tmp_path / f"{name}.training" / "content.pth") for name in ("whole", "parts")]
    assert equal_states(*contents)
    logged = [lines(tmp_path / f"{name}.training", "train") for name in ("whole", "parts")]
    assert [entry["loss"] for entry in logged[0]] == [entry["loss"] for entry in logged[1]]


def test_a_finished_run_is_returned_at_once(tmp_path, monkeypatch):
    first = train(tmp_path / "ae")
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    second = train(tmp_path / "ae")
    assert second == first
    assert second.validation["psnr_db"] > 0


def test_a_finished_autoencoder_that_was_deleted_is_written_again(tmp_path):
    folder = train(tmp_path / "ae").folder
    before = weights(folder)
    folder.rename(tmp_path / "moved")
    assert train(tmp_path / "ae").complete
    assert same(weights(folder), before)


def test_changed_options_are_refused(tmp_path):
    train(tmp_path / "ae")
    with pytest.raises(UsageError, match=r"--ema_decay was 0.999, now 0.5. Choose another --output, or --overwrite"):
        train(tmp_path / "ae", ema_decay=0.5)
    with pytest.raises(UsageError, match=r"mirror images was False, now True"):
        train(tmp_path / "ae", dataset_of(blobs(64), flips=True))
    with pytest.raises(UsageError, match=r"--max_steps was 2, now 4. Choose --resume to resume with this change"):
        train(tmp_path / "ae", max_steps=4)
    assert train(tmp_path / "ae", max_steps=4, resume=True).complete
    assert json.loads((tmp_path / "ae" / "training.json").read_text())["steps"] == 4


def test_overwrite_starts_over_and_keeps_the_old_run(tmp_path):
    train(tmp_path / "ae")
    assert train(tmp_path / "ae", overwrite=True, seed=5).complete
    assert (tmp_path / "ae.training.old-1" / "content.pth").exists()
    assert json.loads((tmp_path / "ae.training" / "config.json").read_text())["options"]["seed"] == 5


def test_weights_depend_only_on_the_seed(tmp_path):
    torch.manual_seed(1)
    first = weights(train(tmp_path / "1").folder)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = weights(train(tmp_path / "2").folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first, second)
    assert not same(first, weights(train(tmp_path / "3", seed=1).folder))


def test_the_folder_of_a_run_records_metrics_samples_and_newest_weights(tmp_path):
    folder = train(tmp_path / "ae", max_steps=3, log_every=2).folder.with_name("ae.training")
    first, last = lines(folder, "train")
    assert (first["step"], last["step"]) == (2, 3)
    assert {"loss", "squared_error", "kl", "lr", "images_per_s", "grad_norm"} <= first.keys()
    (validation,) = lines(folder, "validation")
    assert {"psnr_db", "loss", "squared_error"} <= validation.keys()
    grid = read_sheet(folder / "samples" / "step_0000003.png", 8, 1)
    assert torch.equal(grid[0::2], blobs(20))  # originals, each next to its reconstruction
    assert same(weights(folder / "autoencoder"), weights(tmp_path / "ae"))


def test_validation_and_saves_follow_the_clock(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("training.autoencoder.saving.save_state", lambda folder, content: saved.append(content["step"]))
    train(tmp_path / "ae", max_steps=3, save_minutes=1e-9, validate_minutes=1e-9)
    assert saved == [1, 2, 3]
    assert [entry["step"] for entry in lines(tmp_path / "ae.training", "validation")] == [1, 2, 3]


def test_a_budget_is_measured_once_and_kept_by_a_resume(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(
        "training.autoencoder.loop.steps_within", lambda seconds, run_step: counted.append(run_step()) or 5
    )
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert not train(tmp_path / "ae", minutes=1.0).complete
    assert train(tmp_path / "ae", minutes=1.0).complete
    assert len(counted) == 1
    state = read_torch_file(tmp_path / "ae.training" / "content.pth")
    assert state["step"] == 5
    alone = train(tmp_path / "alone", max_steps=5)
    assert same(weights(tmp_path / "ae"), weights(alone.folder))  # the measured steps left no trace


def test_training_starts_from_another_autoencoder_of_any_architecture(tmp_path):
    first = train(tmp_path / "dc", architecture="dc", **TINY_DC).folder
    second = train(tmp_path / "ae", initial_weights=str(first), lr=0.0, seed=5).folder  # the widths are the folder's
    assert json.loads((second / "config.json").read_text())["_class_name"] == "AutoencoderDC"
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("architecture", ["kl", "dc"])
def test_a_frozen_encoder_keeps_the_latents(architecture, tmp_path):
    options = TINY_DC if architecture == "dc" else {}
    first = train(tmp_path / "first", architecture=architecture, **options).folder
    second = train(tmp_path / "second", initial_weights=str(first), freeze_encoder=True, lr=0.1).folder
    before, after = weights(first), weights(second)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)


def test_a_diverging_run_keeps_its_last_good_weights(tmp_path, monkeypatch):
    good = train(tmp_path / "ae").folder.with_name("ae.training")
    advance = AutoencoderState.advance

    def breaking(state, loss_step, batch, rate):
        advance(state, loss_step, batch._replace(pixels=batch.pixels * float("nan")), rate)

    monkeypatch.setattr(AutoencoderState, "advance", breaking)
    with pytest.raises(DivergedError, match="the last 2 steps had no finite gradient"):
        train(tmp_path / "ae", max_steps=6, resume=True, log_every=2, max_bad_steps=2)
    assert read_torch_file(good / "content.pth")["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8, 8, 8, 8)}, "--image_size 8 cannot be halved 4 times, as the 5 --widths require"),
        ({"batch_size": 65}, "fewer than one batch of 65"),
        ({"freeze_encoder": True}, "--freeze_encoder needs --initial_weights"),
        ({"initial_weights": "nowhere"}, "--initial_weights nowhere: expected the folder"),
        ({"architecture": "dc", "widths": (8,), "kl_weight": 1e-3}, "--kl_weight 0.001: the latents of AutoencoderDC"),
        ({"image_channels": 2}, "--image_channels 2 does not fit images with 1"),
    ],
)
def test_impossible_options_are_refused_before_the_work(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "ae", **options)
    assert not (tmp_path / "ae.training" / "config.json").exists()


@pytest.mark.parametrize("image_channels", [None, 1, 3])
def test_gray_images_are_repeated_for_a_color_autoencoder(image_channels, tmp_path):
    folder = train(tmp_path / "ae", image_channels=image_channels).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["in_channels"] == config["out_channels"] == (image_channels or 1)


def test_every_option_has_a_resume_policy_and_the_saved_record_is_complete(tmp_path):
    record = json.loads((train(tmp_path / "ae").folder / "training.json").read_text())
    assert record["widths"] == [8, 16]
    names = {field.name for field in dataclasses.fields(AutoencoderTrainingOptions)}
    assert names - record.keys() == {"resume", "overwrite"}
