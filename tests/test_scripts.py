"""End-to-end tests of the scripts, on small files in the real formats, with a tiny autoencoder and network.

Most runs take place in this process, since importing torch and diffusers takes seconds. Each script is also run once in a
separate process.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latent_flow
from checkpoints.experiments import newest_model
from checkpoints.files import load_model, read_weights, save_weights
from datasets_prep.images import center_crop
from evaluation.features.registry import FeatureOptions, load_features
from evaluation.reference import summarise
from evaluation.sources import open_source
from evaluation.statistics import save_statistics
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from runtime.precision import MachineOptions
from runtime.torch_files import read_torch_file
from sampling.loading import load_sampler
from sampling.request import SamplerRequest, SourceOptions

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("process_restored")
TRAIN, TEST, AUTOENCODER = "train_flow_latent.py", "test_flow_latent.py", "train_autoencoder.py"
COUNTS = {"train": 300, "t10k": 60}
SOLVER = ["--method", "euler", "--num_steps", "3", "--precision", "fp32"]
NETWORK = ["--model_type", "DiT-Mi/4", "--num_classes", "10", "--label_dropout", "0.1", "--batch_size", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    """A folder with data/ (IDX files) and ae/ (an autoencoder: factor 4, two latent channels)."""
    place = tmp_path_factory.mktemp("scripts")
    write_idx(place / "data", COUNTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        statistics = {"latents_mean": [0.0, 0.1], "latents_std": [0.5, 0.5]}
        network = new_autoencoder_kl(1, (8, 8, 8), 2, 32, statistics)
    network.decoder.conv_out.weight.data *= 5  # gives the images some contrast
    network.save_pretrained(place / "ae")
    return place


def data_flags(place):
    return ["--dataset", "fashion_mnist", "--datadir", str(place / "data")]


def train_flags(place, exp="run", steps=4):
    source = [*data_flags(place), "--pretrained_autoencoder_ckpt", str(place / "ae")]
    run = ["--save_root", str(place / "saved"), "--exp", exp, "--max_steps", str(steps), "--log_every", "1"]
    return [*source, *NETWORK, *SOLVER, *run]


def folder_of(place, exp="run"):
    return place / "saved" / "latent_flow" / "fashion_mnist" / exp


def as_process(script, flags):
    return subprocess.run(
        [sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def trained(place):
    """The finished process of a short training run with the run folder `folder_of(place)`."""
    finished = as_process(TRAIN, train_flags(place))
    assert finished.returncode == 0, finished.stderr
    return finished


def sample_flags(place, output, count=20, batch_size=20):
    chosen = [*data_flags(place), "--save_root", str(place / "saved"), "--exp", "run", *SOLVER]
    return [*chosen, "--n_sample", count, "--batch_size", batch_size, "--output_dir", output]


@pytest.fixture
def checkpoint(place, trained):
    return newest_model(folder_of(place))


def test_training_writes_checkpoint_preview_and_metrics(place, trained, checkpoint):
    folder = folder_of(place)
    assert checkpoint.name == "model_1.safetensors"
    assert re.search(rf"^run folder +{re.escape(str(folder))}$", trained.stdout, re.M)
    assert trained.stdout.splitlines()[-2] == "complete; sample with:"
    with Image.open(folder / "samples" / "step_0000004.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] > 8 * 56
    assert pixels.shape[1] > 10 * 56
    assert pixels.std() > 1
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries if entry["kind"] == "validation"] == [4]
    options = json.loads((folder / "config.json").read_text())["options"]
    assert (options["max_steps"], options["datadir"]) == (4, str(place / "data"))
    assert read_torch_file(folder / "content.pth")["step"] == 4
    measured = json.loads((folder / "samples" / "reconstructions.json").read_text())
    assert measured["autoencoder"]["id"] == str(place / "ae")
    picture = folder / "samples" / "reconstructions.png"
    assert f"PSNR {measured['psnr_db']:.2f} dB on held-out images; reconstructions: {picture}" in trained.stdout
    with Image.open(folder / "samples" / "reconstructions.png") as picture:
        assert picture.size == (2 * (16 * 30 + 2), 2 * (2 * 30 + 2))
    header = read_weights(checkpoint)[1]
    assert (header.step, header.dataset.crop, header.autoencoder.id) == (4, 28, str(place / "ae"))
    assert list((place / "data" / "latent_cache").glob("*/manifest.json"))


def test_restarting_a_complete_run_changes_nothing(place, trained, checkpoint, call):
    before = {path: path.read_bytes() for path in folder_of(place).rglob("*") if path.is_file()}
    code, out, _ = call(TRAIN, train_flags(place))
    assert code == 0
    assert "complete; sample with:" in out
    assert {path: path.read_bytes() for path in before if path.exists()} == before


def test_trained_weights_differ_from_the_initial_ones(place, trained, checkpoint):
    """The EMA after four steps lies between the initial and the trained weights."""
    content = read_torch_file(folder_of(place) / "content.pth")
    ema, _ = read_weights(checkpoint)
    name = "final_layer.linear.weight"  # initialized with zeros
    assert 0 < ema[name].abs().mean() < content["network"][name].abs().mean()


SWITCHES = (
    "--prediction data --velocity_direction 1 --contrastive_weight 0.05 --loss_weighting min_snr --coupling optimal_transport "
    "--training_time_shift auto --time_shift auto --optimizer muon --muon_matrices attention_mlp --cfg_scale 2"
).split()


def test_every_switch_of_the_loss_together(place, trained, checkpoint, call, tmp_path):
    assert call(TRAIN, [*train_flags(place, exp="switches"), *SWITCHES])[0] == 0
    path = newest_model(folder_of(place, "switches"))
    header = read_weights(path)[1]
    assert (header.path.prediction, header.path.coupling, header.path.training_time_shift) == (
        "data",
        "optimal_transport",
        1,
    )
    assert len(header.contrast_means) == 10 * header.network.num_out_channels * header.latent_size**2
    assert read_weights(checkpoint)[1].contrast_means == ()
    flags = [*sample_flags(place, tmp_path), "--exp", "switches", "--time_shift", "auto", "--cfg_scale", "2"]
    assert call(TEST, flags)[0] == 0
    code, _, err = call(TRAIN, train_flags(place, exp="switches"))  # without the switches, it is another run
    assert code == 2
    assert all(name in err for name in ("--prediction", "--coupling", "--contrastive_weight", "--muon_matrices"))
    flow = latent_flow.load(path)
    assert flow.sample(labels=[1, 2], steps=2, cfg_scale=2.0, time_shift="auto").shape == (2, 1, 28, 28)
    request = SamplerRequest(SourceOptions(checkpoint=str(path)), machine=MachineOptions(device="cpu"))
    assert load_sampler(request).sampler.correction is not None


def test_samples_do_not_depend_on_the_batch_size(place, trained, checkpoint, call, tmp_path):
    kept = ["--save_images", "npz", "--cfg_scale", "1.5", "--output_json"]
    finished = as_process(
        TEST, [*map(str, sample_flags(place, tmp_path / "a", batch_size=7)), *kept, str(tmp_path / "a.json")]
    )
    assert finished.returncode == 0, finished.stderr
    code, out, _ = call(TEST, [*sample_flags(place, tmp_path / "b"), *kept, tmp_path / "b.json"])
    assert code == 0
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert set(a.files) == {"images", "labels", "indices", "evaluations", "network_evaluations"}
    assert a["images"].shape == (20, 28, 28, 1)
    assert a["images"].dtype == np.uint8
    np.testing.assert_array_equal(a["labels"], np.arange(20) % 10)
    np.testing.assert_array_equal(a["labels"], b["labels"])
    images = a["images"].astype(int)
    assert np.abs(images - b["images"]).max() <= 1
    assert np.abs(images[0] - images[10]).max() > 10  # same class, different noise
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["samples"], result["nfe"], result["step"], result["seed"]) == (20, 3, 4, 42)
    assert result["checkpoint"] == str(checkpoint)
    assert out.startswith("changed options (")
    assert result["grid"] in out.splitlines()[-1]
    assert Path(result["grid"]).is_file()


def test_samples_as_files_and_with_another_seed(place, trained, call, tmp_path):
    code, out, _ = call(TEST, [*sample_flags(place, tmp_path / "png", count=3), "--save_images", "png"])
    assert f"files       in {tmp_path / 'png'}" in out.splitlines()
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "png").glob("0*")) == ["000000.png", "000001.png", "000002.png"]
    code, _, _ = call(TEST, [*sample_flags(place, tmp_path / "npz", count=5), "--save_images", "npz"])
    assert code == 0
    images = np.load(tmp_path / "npz" / "samples.npz")["images"]
    for index in range(3):  # equal to the first of more samples
        with Image.open(tmp_path / "png" / f"00000{index}.png") as picture:
            assert np.abs(np.asarray(picture).astype(int) - images[index, :, :, 0]).max() <= 1
    call(TEST, [*sample_flags(place, tmp_path / "seed", count=5), "--save_images", "npz", "--seed", "43"])
    assert np.abs(np.load(tmp_path / "seed" / "samples.npz")["images"].astype(int) - images).max() > 10


def test_score_with_the_bundled_classifier(place, trained, call, tmp_path):
    code, out, err = call(
        TEST, [*sample_flags(place, tmp_path, count=100), "--compute_fid", "--output_json", tmp_path / "r"]
    )
    assert code == 0, err
    result = json.loads((tmp_path / "r").read_text())
    assert result["metric"] == "FD (fashion-mnist features)"
    assert (result["samples"], result["reference_samples"]) == (100, COUNTS["train"])
    assert result["value"] > 1  # noise is far from rectangles
    assert 0 <= result["recognised"] <= 1
    assert f"{result['metric']} {result['value']:.3f}" in out
    assert "FID" not in out


def test_score_against_a_folder_or_a_statistics_file(place, trained, call, tmp_path):
    real = [*sample_flags(place, tmp_path / "real", count=100), "--seed", 43, "--save_images", "png"]
    assert call(TEST, real)[0] == 0
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    summary = summarise(open_source(tmp_path / "real"), features, ["moments"])
    save_statistics(tmp_path / "real.npz", summary.statistics)
    values = []
    for reference in (tmp_path / "real", tmp_path / "real.npz"):
        flags = ["--compute_fid", "--real_img_dir", reference, "--output_json", tmp_path / "r"]
        code, _, err = call(TEST, [*sample_flags(place, tmp_path, count=100), *flags])
        assert code == 0, err
        result = json.loads((tmp_path / "r").read_text())
        assert (str(reference) in result["reference"].values(), result["reference_samples"]) == (True, 100)
        values.append(result["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert call(TEST, [*sample_flags(place, tmp_path), "--real_img_dir", "x"])[2].count("no effect without") == 1


def test_references_are_brought_to_the_samples_size_or_refused_before_sampling(place, trained, call, tmp_path):
    generator = np.random.default_rng(0)
    for index in range(100):
        side = (56, 40)[index % 2]
        picture = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for folder, size in (("mixed", None), ("resized", 28)):
            (tmp_path / folder).mkdir(exist_ok=True)
            shown = picture if size is None else Image.fromarray(center_crop(picture, size))
            shown.save(tmp_path / folder / f"{index:03d}.png")
    np.savez(tmp_path / "other.npz", mu=np.zeros(128), sigma=np.eye(128), metadata=np.array('{"resolution": [64, 64]}'))
    values = []
    for folder in ("mixed", "resized"):
        flags = ["--compute_fid", "--real_img_dir", tmp_path / folder, "--output_json", tmp_path / "r"]
        code, _, err = call(TEST, [*sample_flags(place, tmp_path / folder / "out", count=100), *flags])
        assert code == 0, err
        assert ("resized and cropped to 28 x 28" in err) == (folder == "mixed")
        values.append(json.loads((tmp_path / "r").read_text())["value"])
    assert values[0] == values[1]
    for more, message in (
        (["--real_img_dir", tmp_path / "other.npz"], "samples are 28 x 28, the reference is 64 x 64"),
        (["--metrics", "precision", "--n_sample", 3], "--metrics precision needs at least 4 samples, but there are 3"),
        (["--features", "inception", "--feature_weights", "x.pth"], "x.pth"),
    ):
        code, _, err = call(TEST, [*sample_flags(place, tmp_path / "refused", count=20), "--compute_fid", *more])
        assert code == 2
        assert message in err
        assert "sampling:" not in err
    for more in (["--eval_samples", 1], ["--eval_samples", 4, "--features", "inception", "--feature_weights", "x.pth"]):
        code, _, err = call(TRAIN, [*train_flags(place, exp="refused"), *more])
        assert (code, "needs at least 2 samples" in err or "x.pth" in err) == (2, True)
        assert not folder_of(place, "refused").exists()


def test_samples_from_the_global_generator(place, trained, call, tmp_path):
    def samples(generator, name):
        flags = ["--generator", generator, "--save_images", "npz"]
        assert call(TEST, [*sample_flags(place, tmp_path / name, count=5), *flags])[0] == 0
        return np.load(tmp_path / name / "samples.npz")["images"].astype(int)

    one, again, streams = samples("dummy", "a"), samples("dummy", "b"), samples("determ", "c")
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - streams).max() > 10


def test_a_trained_autoencoder_can_be_loaded(place, call, tmp_path):
    flags = [
        "--output",
        tmp_path / "ae",
        "--widths",
        8,
        16,
        "--latent_channels",
        3,
        "--max_steps",
        5,
        "--batch_size",
        16,
    ]
    code, out, err = call(AUTOENCODER, [*data_flags(place), *flags, "--precision", "fp32"])
    assert code == 0, err
    assert str(tmp_path / "ae") in out
    autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 1)
    assert (autoencoder.factor, autoencoder.latent_channels) == (2, 3)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    latents = autoencoder.sample(autoencoder.encode(images))
    assert latents.shape == (2, 3, 16, 16)
    assert autoencoder.decode(latents).shape == images.shape
    assert autoencoder.std.unique().numel() == 3  # measured per channel


def test_own_photos_in_pixel_space(photo_dir, call, tmp_path):
    data = ["--dataset", "folder", "--datadir", photo_dir, "--image_size", 16]
    run = ["--save_root", tmp_path / "saved", "--exp", "photos", *SOLVER]
    network = ["--pretrained_autoencoder_ckpt", "none", "--model_type", "DiT-Mi/8", "--num_classes", 2]
    code, _, err = call(TRAIN, [*data, *run, *network, "--batch_size", 8, "--max_steps", 4])
    assert code == 0, err
    folder = tmp_path / "saved" / "latent_flow" / "folder" / "photos"
    header = read_weights(newest_model(folder))[1]
    assert header.dataset.class_names == ("cat", "dog")
    assert newest_model(folder).name == "model_2.safetensors"  # 24 images in batches of 8: three steps per epoch
    assert not (folder / "samples" / "reconstructions.png").exists()
    code, _, err = call(TEST, [*data, *run, "--n_sample", 5, "--save_images", "npz", "--output_dir", tmp_path])
    assert code == 0, err
    samples = np.load(tmp_path / "samples.npz")
    assert samples["images"].shape == (5, 16, 16, 3)
    assert samples["labels"].tolist() == [0, 1, 0, 1, 0]


def test_the_pixel_unets_arguments_files(place, call, tmp_path):
    """Shortened to two training steps and one solver step."""
    name = "fashion_mnist_pixel_unet"
    flags = ["--datadir", place / "data", "--save_root", tmp_path, "--num_steps", 1]
    training = ["--args_file", ROOT / "train_args" / f"{name}.txt", "--max_steps", 2, "--batch_size", 8]
    code, _, err = call(TRAIN, [*training, *flags])
    assert code == 0, err
    folder = tmp_path / "latent_flow" / "fashion_mnist" / name
    sampling = ["--args_file", ROOT / "test_args" / f"{name}.txt", "--n_sample", 130, "--no-compute_fid"]
    code, _, err = call(TEST, [*sampling, *flags])
    assert code == 0, err
    for grid in ("step_0000002.png", f"{newest_model(folder).stem}_euler_1steps_cfg1_seed42.png"):
        with Image.open(folder / "samples" / grid) as picture:
            assert picture.size == (2 * (16 * 30 + 2), 2 * (8 * 30 + 2))


def test_the_latent_dits_arguments_files(place, call, tmp_path):
    """Shortened, with a smaller network and a local autoencoder for color images, whose output is converted to gray."""
    name, ae = "mnist_latent_dit", tmp_path / "ae"
    torch.manual_seed(0)
    new_autoencoder_kl(3, (8, 8, 8, 8), 4, 32, {}).save_pretrained(ae)
    flags = ["--datadir", place / "data", "--save_root", tmp_path, "--atol", 0.1, "--rtol", 0.1]
    training = ["--args_file", ROOT / "train_args" / f"{name}.txt", "--max_steps", 2, "--model_type", "DiT-Mi/2"]
    training += ["--pretrained_autoencoder_ckpt", ae, "--latent_cache_dir", tmp_path / "cache"]
    code, out, err = call(TRAIN, [*training, *flags])
    assert code == 0, err
    folder = tmp_path / "latent_flow" / "mnist" / name
    header = read_weights(newest_model(folder))[1]
    assert (header.latent_channels, header.latent_size, header.num_classes) == (4, 4, 1)
    assert (header.path.sigma_min, header.path.time_sampling) == (1e-3, "stratified")
    np.testing.assert_allclose(header.autoencoder.latents_std, 1 / 0.18215, rtol=1e-6)  # diffusers' default
    assert re.search(r"autoencoder +PSNR [\d.]+ dB on held-out images", out)
    with Image.open(folder / "samples" / "step_0000002.png") as picture:
        assert picture.size == (2 * (4 * 30 + 2), 2 * (4 * 30 + 2))
        red, green, blue = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert (red == green).all()
    assert (red == blue).all()
    sampling = ["--args_file", ROOT / "test_args" / f"{name}.txt", "--n_sample", 5, "--no-compute_fid"]
    code, _, err = call(TEST, [*sampling, *flags, "--save_images", "npz", "--output_dir", tmp_path])
    assert code == 0, err
    assert np.load(tmp_path / "samples.npz")["images"].shape == (5, 28, 28, 1)


def test_training_on_precomputed_latents(place, call, tmp_path):
    """Trains on moments [4, 8, 8] of images of 32 pixels. Only scoring needs images."""
    for index in range(40):
        (tmp_path / "data" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        moments = np.random.default_rng(index).normal(size=(4, 8, 8)).astype(np.float32)
        np.save(tmp_path / "data" / "ab"[index % 2] / f"{index}.npy", moments)
    data = ["--dataset", "latent_imagenet_256", "--datadir", tmp_path / "data", "--image_size", 32]
    run = ["--save_root", tmp_path / "saved", "--exp", "run", *SOLVER]
    network = [*NETWORK, "--num_classes", 2, "--batch_size", 8, "--max_steps", 3, "--log_every", 1]
    flags = [*data, *run, *network, "--pretrained_autoencoder_ckpt", place / "ae"]
    code, out, err = call(TRAIN, flags)
    assert code == 0, err
    assert "38 training images" in out
    folder = tmp_path / "saved" / "latent_flow" / "latent_imagenet_256" / "run"
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in entries if "loss" in entry)
    code, _, err = call(TRAIN, [*flags, "--overwrite", "--eval_every", 1, "--eval_samples", 8])
    assert_one_line(code, err, "latent_imagenet_256 holds latents but no images, which --eval_samples needs")
    code, _, err = call(TEST, [*data, *run, "--n_sample", 4, "--output_dir", tmp_path])
    assert code == 0, err


def test_start_from_other_weights(place, checkpoint, call):
    """Without a null class, the label table does not fit. All other weights are loaded."""
    flags = [*train_flags(place, "fine"), "--init_from", checkpoint, "--label_dropout", 0, "--lr", 0, "--no-use_ema"]
    code, out, _ = call(TRAIN, flags)
    assert code == 0
    assert re.search(r"init +loaded (\d+) of .*no match in name and shape: y_embedder\.embedding_table\.weight\b", out)
    weights, loaded = read_weights(checkpoint)[0], read_weights(newest_model(folder_of(place, "fine")))[0]
    differing = {
        name for name in loaded if loaded[name].shape != weights[name].shape or (loaded[name] != weights[name]).any()
    }
    assert differing == {"y_embedder.embedding_table.weight"}


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} lines in {path}")


def test_interrupted_training_continues_bit_for_bit(place, trained, call):
    """On Ctrl-C, the script saves and says how to resume. The same command then completes the run."""
    flags = [*train_flags(place, "stopped", steps=100), "--batch_size", "8", "--num_threads", "1"]
    process = subprocess.Popen(
        [sys.executable, TRAIN, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_lines(folder_of(place, "stopped") / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "to resume, run the same command again, without --overwrite" in out.splitlines()[-1]
    assert "Traceback" not in err
    stopped_at = read_torch_file(folder_of(place, "stopped") / "content.pth")["step"]
    assert 3 <= stopped_at < 100
    code, out, _ = call(TRAIN, flags)
    assert code == 0
    assert f"resuming at step {stopped_at} of 100" in out
    code, _, _ = call(TRAIN, [*train_flags(place, "steady", steps=100), "--batch_size", "8", "--num_threads", "1"])
    assert code == 0
    stopped, steady = (folder_of(place, exp) for exp in ("stopped", "steady"))
    one, other = (read_weights(newest_model(folder))[0] for folder in (stopped, steady))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (read_torch_file(folder / "content.pth")["network"] for folder in (stopped, steady))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [
        [
            (entry["step"], entry["loss"])
            for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in (stopped, steady)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_training_killed_again_and_again_ends_with_the_same_bits(place, trained, call):
    """SIGKILL at arbitrary moments. Each start removes the lock and partial files that the previous one left."""
    flags = [*train_flags(place, "killed", steps=60), "--batch_size", "8", "--num_threads", "1"]
    flags += ["--save_content_every_steps", "1"]
    folder, notes = folder_of(place, "killed"), 0
    for lines in (5, 20, 35, 50):
        words, pipe = [sys.executable, TRAIN, *flags], subprocess.PIPE
        process = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        wait_for_lines(folder / "metrics.jsonl", lines, process)
        process.kill()
        notes += "removed run.lock, left by a process that has ended" in process.communicate()[0]
    assert notes == 3
    code, out, err = call(TRAIN, flags)
    assert code == 0, err
    assert re.search(r"resuming at step \d+ of 60", out)
    assert not {path.name for path in folder.iterdir() if "tmp" in path.name or "lock" in path.name}
    flags[flags.index("killed")] = "unharmed"
    assert call(TRAIN, flags)[0] == 0
    one, other = (read_torch_file(folder_of(place, exp) / "content.pth") for exp in ("killed", "unharmed"))
    for part in (lambda content: content["network"], lambda content: content["ema"]["weights"]):
        assert all(torch.equal(part(one)[name], value) for name, value in part(other).items())
    one, other = (read_weights(newest_model(folder_of(place, exp)))[0] for exp in ("killed", "unharmed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_one_line(code, err, message):
    """Check for exit code 2 and a single line `error: ...` at the end of stderr, without a traceback."""
    lines = err.splitlines()
    assert code == 2, err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    assert "Traceback" not in err
    assert re.search(message, lines[-1]), lines[-1]


TRAINING_MISTAKES = {
    "unknown dataset": (["--dataset", "cats"], "unknown dataset 'cats': expected one of fashion_mnist, mnist, folder"),
    "missing folder": (["--dataset", "folder", "--datadir", "{tmp}/absent"], "{tmp}/absent is not a directory"),
    "empty folder": (["--dataset", "folder", "--datadir", "{tmp}"], "no images in {tmp}: expected files ending in"),
    "odd image size": (["--image_size", "33"], "28 x 28 .*but got --image_size 33"),
    "size for the patches": (["--image_size", "40"], "latents of side 10 cannot be divided into patches of side 4"),
    "size for the autoencoder": (["--image_size", "30", "--model_type", "DiT-Mi/1"], "multiple of 4 .*but it is 30"),
    "label out of range": (["--num_classes", "5"], "labels up to 9, out of range for --num_classes 5"),
    "unknown key": (["--args_file", "{tmp}/typo.txt"], r"typo\.txt, line 2: unknown key IMAGE_SIZ "),
    "missing arguments file": (["--args_file", "{tmp}/absent.txt"], r"cannot read the arguments file .*absent\.txt"),
    "unknown method": (["--method", "eular"], "unknown --method 'eular': expected one of euler, midpoint"),
    "no step": (["--step_size", "0"], "--step_size must be at least 1e-06, but 0.0 was given"),
    "one beta": (["--adam_betas", "0.9"], "--adam_betas: expected two numbers below 1"),
    "unknown network": (
        ["--model_type", "DiT-Q/2"],
        "unknown --model_type 'DiT-Q/2': expected one of DiT-",
    ),
    "no null class": (
        ["--cfg_scale", "2", "--label_dropout", "0"],
        "--cfg_scale 2.0 needs a network with a null class",
    ),
    "wrong channels": (["--num_in_channels", "4"], "--num_in_channels 4 contradicts the autoencoder.* 2 channels"),
    "wrong factor": (["--f", "8"], "--f 8 contradicts the autoencoder .*whose factor is 4"),
    "no autoencoder": (["--pretrained_autoencoder_ckpt", "{tmp}/none"], "{tmp}/none: no such folder"),
    "empty autoencoder": (["--pretrained_autoencoder_ckpt", "{tmp}"], "cannot load the autoencoder {tmp}: "),
    "name of a path": (["--exp", "../x"], r"--exp '\.\./x': expected a plain name"),
    "no such GPU": (["--device", "gpu"], "--device gpu is not available: expected auto, cpu, cuda or cuda:N"),
    "missing start": (["--init_from", "{tmp}/absent"], "cannot read the checkpoint {tmp}/absent"),
    "negative": (["--lr", "-1"], "--lr must be at least 0, but -1.0 was given"),
    "not a share": (["--label_dropout", "2"], "--label_dropout must be at most 1, but 2.0 was given"),
    "absent GPU": (
        ["--device", "cuda:99"],
        "--device cuda:99 is not available: expected auto, cpu, cuda or cuda:N on this machine",
    ),
    "factor of pixels": (
        ["--pretrained_autoencoder_ckpt", "none", "--f", "8"],
        "--f 8 contradicts the autoencoder none, whose factor is 1",
    ),
}


@pytest.mark.parametrize("mistake", TRAINING_MISTAKES)
def test_training_mistakes(mistake, place, call, tmp_path):
    flags, message = TRAINING_MISTAKES[mistake]
    (tmp_path / "typo.txt").write_text("IMAGE_SIZE=32\nIMAGE_SIZ=32\n")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    code, _, err = call(TRAIN, [*train_flags(place, "mistake"), *flags])
    assert_one_line(code, err, message.replace("{tmp}", str(tmp_path)))


def test_after_a_failed_start_the_same_name_can_be_used(place, call):
    """The failed starts in the test above leave nothing that would need --overwrite."""
    call(TRAIN, [*train_flags(place, "mistake"), "--num_classes", "5"])
    code, _, err = call(TRAIN, [*train_flags(place, "mistake", steps=1)])
    assert code == 0, err


def test_training_mistake_in_a_separate_process(place):
    finished = as_process(TRAIN, [*train_flags(place, "mistake"), "--dataset", "cats"])
    assert_one_line(finished.returncode, finished.stderr, "unknown dataset 'cats'")
    assert len(finished.stderr.splitlines()) == 1


def test_a_second_start_in_the_same_folder_is_refused(place, trained, call):
    lock = folder_of(place) / "run.lock"
    assert not lock.exists()  # released by the first run
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "identity": "", "since": "yesterday"}))
    before = {path: path.read_bytes() for path in folder_of(place).rglob("*") if path.is_file()}
    for more in ([], ["--overwrite"]):
        code, _, err = call(TRAIN, [*train_flags(place), *more])
        assert_one_line(code, err, "process 7 on elsewhere, since yesterday, is training in this folder: .*delete")
    assert {path: path.read_bytes() for path in folder_of(place).rglob("*") if path.is_file()} == before
    lock.unlink()


def test_other_options_under_the_same_name(place, trained, call):
    code, _, err = call(TRAIN, [*train_flags(place), "--seed", "7"])
    assert_one_line(code, err, "holds a run with other options: --seed was 1024, now 7.*--overwrite")


def test_damaged_content(place, trained, call):
    shutil.copytree(folder_of(place), folder_of(place, "torn"))
    content = folder_of(place, "torn") / "content.pth"
    content.write_bytes(content.read_bytes()[:-1000])
    config = content.with_name("config.json")
    config.write_text(config.read_text().replace('"exp": "run"', '"exp": "torn"'))
    code, _, err = call(TRAIN, train_flags(place, "torn"))
    assert_one_line(code, err, r"cannot read .*torn/content\.pth")


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest"])
def test_corrupt_cache(damage, place, trained, call, tmp_path):
    shutil.copytree(place / "data" / "latent_cache", tmp_path / "cache")
    shard = next((tmp_path / "cache").glob("*_train_*/moments_00000.npy"))
    if damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-100] ^= 4
        shard.write_bytes(data)
        message = rf"the file {shard} is damaged .*delete the folder {shard.parent}"
    elif damage == "missing":
        shard.unlink()
        message = rf"cannot read the latent cache file {shard}"
    else:
        manifest = shard.with_name("manifest.json")
        manifest.write_text(manifest.read_text().replace('"image_size": 32', '"image_size": 64'))
        message = "built for another image_size: expected 32, but found 64"
    code, _, err = call(TRAIN, [*train_flags(place, "damaged"), "--latent_cache_dir", tmp_path / "cache"])
    assert_one_line(code, err, message)


FULL = {
    "content.pth": "{folder}/content.pth",
    "model_1.safetensors": "{folder}/model_1.safetensors",
    "config.json": "{folder}/config.json",
    "step_0000004.png": "{folder}/samples/step_0000004.png",
    "moments_00000.npy": "{cache}/moments_00000.npy",
}


@pytest.mark.parametrize("name", FULL)
def test_no_space_left(name, place, trained, call, tmp_path):
    """Each file's temporary file is a link to /dev/full, which is always full."""
    cache = next((place / "data" / "latent_cache").glob("*_train_*")).name
    places = {"folder": tmp_path / "saved/latent_flow/fashion_mnist/full", "cache": tmp_path / "cache" / cache}
    path = Path(FULL[name].format(**places))
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    flags = ["--save_root", tmp_path / "saved"]
    flags += ["--latent_cache_dir", tmp_path / "cache"] if "cache" in path.parts else []
    code, _, err = call(TRAIN, [*train_flags(place, "full"), *flags])
    if path.suffix == ".png":  # a run goes on without a sample grid
        assert code == 0, err
        assert f"warning: cannot write {path} (No space left on device); the run goes on" in err
    else:
        assert_one_line(code, err, "No space left on device")
    assert not path.exists()


SAMPLING_MISTAKES = {
    "other network": (["--model_type", "DiT-S/2"], "--model_type DiT-S/2 contradicts the checkpoint .*has DiT-Mi/4"),
    "other classes": (["--num_classes", "7"], "--num_classes 7 contradicts the checkpoint .*has 10"),
    "other size": (["--image_size", "64"], "--image_size 64 contradicts the checkpoint .*has 32"),
    "other dropout": (["--label_dropout", "0.2"], "--label_dropout 0.2 contradicts the checkpoint .*has 0.1"),
    "unknown method": (["--method", "karras"], "unknown --method 'karras': expected one of euler, midpoint"),
    "no such experiment": (
        ["--exp", "absent"],
        r"no model_<epoch>\.safetensors or model_<epoch>\.pth in .*absent .*no such folder.*--checkpoint",
    ),
    "no such epoch": (
        ["--epoch_id", "9"],
        r"no model_9\.safetensors or model_9\.pth in .*found: model_1\.safetensors",
    ),
    "missing file": (["--checkpoint", "{tmp}/absent"], "cannot read the checkpoint {tmp}/absent"),
    "another kind of file": (["--checkpoint", "{tmp}/notes.txt"], r"cannot read the checkpoint {tmp}/notes\.txt"),
    "unknown key": (["--args_file", "{tmp}/typo.txt"], r"typo\.txt, line 1: unknown key N_SAMPEL "),
    "no sample": (["--n_sample", "0"], "--n_sample must be at least 1, but 0 was given"),
    "wrong weights": (["--compute_fid", "--feature_weights", "{tmp}/notes.txt"], r"notes\.txt"),
}


@pytest.mark.parametrize("mistake", SAMPLING_MISTAKES)
def test_sampling_mistakes(mistake, place, trained, call, tmp_path):
    flags, message = SAMPLING_MISTAKES[mistake]
    (tmp_path / "typo.txt").write_text("N_SAMPEL=20\n")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    code, _, err = call(TEST, [*sample_flags(place, tmp_path / "out"), *flags])
    assert_one_line(code, err, message.replace("{tmp}", str(tmp_path)))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_corrupt_checkpoint(damage, place, checkpoint, call, tmp_path):
    data = bytearray(checkpoint.read_bytes())
    data[-1000] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data[:-5000] if damage == "truncated" else data)
    flags = [*sample_flags(place, tmp_path), "--checkpoint", tmp_path / "bad.safetensors"]
    code, _, err = call(TEST, flags)
    assert_one_line(code, err, r"the checkpoint .*bad\.safetensors")


def test_guidance_of_a_network_without_null_class(place, checkpoint, call, tmp_path):
    weights, header = read_weights(checkpoint)
    weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][:10]
    without = replace(header, network=replace(header.network, label_dropout=0.0))
    save_weights(tmp_path / "m", weights, without)
    flags = [*sample_flags(place, tmp_path), "--checkpoint", tmp_path / "m"]
    code, _, err = call(TEST, [*flags, "--cfg_scale", "2"])
    assert_one_line(code, err, "--cfg_scale 2.0 needs a network with a null class")
    assert call(TEST, [*flags, "--n_sample", "2"])[0] == 0


def test_sampling_onto_a_full_disk(place, trained, call, tmp_path):
    (tmp_path / f"samples.npz.tmp-{os.getpid()}").symlink_to("/dev/full")
    code, _, err = call(TEST, [*sample_flags(place, tmp_path), "--save_images", "npz"])
    assert_one_line(code, err, "No space left on device")


def test_five_lines_of_python(checkpoint):
    """Load a checkpoint and sample, as shown in the README."""
    from flow.solvers import SolverOptions
    from runtime.precision import Machine
    from sampling.sampler import Sampler, generate

    model = load_model(checkpoint)
    facts, shape = model.header.dataset, model.header.latent_shape
    machine, solver = Machine(torch.device("cpu"), "fp32"), SolverOptions("heun", 2)
    sampler = Sampler(model.network, model.autoencoder, facts, shape, 10, solver, machine, seed=0)
    (batch,) = generate(sampler, range(4))
    assert batch.images.shape == (4, 1, 28, 28)
    assert batch.evaluations.tolist() == [4] * 4


def test_a_run_of_lfms_code_is_resumed(place, trained, call):
    """LFM's content.pth in the run folder is refused without --resume. With it, the run resumes at the stored epoch."""
    content = read_torch_file(folder_of(place) / "content.pth")
    names = list(content["network"])  # a DiT's parameters in order; the first, the position table, is frozen
    moments = content["optimizers"][0]["state"]
    states = {number + 1: {**moments[number], "ema": content["network"][names[number + 1]]} for number in moments}
    published = {
        "epoch": 1,
        "global_step": 9,
        "args": argparse.Namespace(exp="published"),
        "model_dict": {f"module.{name}": value for name, value in content["network"].items()},
        "optimizer": {"state": states, "param_groups": [{"lr": 1e-3, "params": list(range(len(names)))}]},
        "scheduler": {},
    }
    folder = folder_of(place, "published")
    folder.mkdir()
    torch.save(published, folder / "content.pth")
    code, _, err = call(TRAIN, train_flags(place, "published", steps=11))
    assert_one_line(code, err, r"content\.pth that no run of this project wrote: choose --resume")
    code, _, err = call(TRAIN, [*train_flags(place, "published", steps=11), "--resume", "--label_dropout", "0"])
    assert_one_line(code, err, r"the file would fit with --label_dropout 0\.1")
    code, out, err = call(TRAIN, [*train_flags(place, "published", steps=11), "--resume"])
    assert code == 0, err
    assert f"LFM's published code: {len(names)} weights, {len(moments)} EMA weights" in out
    assert "resuming at step 9 of 11" in out
    after = read_torch_file(folder / "content.pth")
    assert after["step"] == 11
    assert [state["step"].item() for state in after["optimizers"][0]["state"].values()] == [4 + 2] * len(moments)


def test_init_from_an_lfm_checkpoint(place, trained, checkpoint, call, tmp_path):
    """--model_ckpt is LFM's name for the flag. Its file is written by torch.save; a bare name refers to the run folder."""
    weights = read_weights(checkpoint)[0]
    folder_of(place, "tuned").mkdir()
    torch.save({f"module.{name}": value for name, value in weights.items()}, folder_of(place, "tuned") / "model_7.pth")
    flags = [*train_flags(place, "tuned", steps=1), "--model_ckpt", "model_7.pth", "--lr", 0, "--no-use_ema"]
    code, out, err = call(TRAIN, flags)
    assert code == 0, err
    assert f"loaded {len(weights)} of {len(weights)} weights" in out
    loaded = read_weights(folder_of(place, "tuned") / "best.safetensors")[0]
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
