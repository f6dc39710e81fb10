"""train_args/folder_small.txt on folders as people have them: photographs, class folders, gray scans, 16-bit TIFFs."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from checkpoints.experiments import newest_model
from checkpoints.files import read_header, read_weights
from runtime.pictures import read_sheet
from runtime.weights import weights_hash
from training.autoencoder.state import AutoencoderState

pytestmark = pytest.mark.usefixtures("process_restored")
SCRIPT = "train_flow_latent.py"
SHORT = ["--args_file", "train_args/folder_small.txt", "--minutes", "0", "--max_steps", "2", "--autoencoder_steps", "3"]
SMALL = [
    "--image_size",
    "16",
    "--model_type",
    "DiT-Mi/4",
    "--batch_size",
    "16",
    "--grid_samples",
    "4",
    "--num_steps",
    "2",
]


def picture(number, side=24, channels=3):
    """A colored disk on a gradient: uint8 [side, side + 6, channels]."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:side, : side + 6]
    disk = np.hypot(y - side * random.random(), x - side * random.random()) < side / 3
    return (5 * y + x + 150 * disk)[..., None].repeat(channels, 2).astype(np.uint8) ^ random.integers(
        64, dtype=np.uint8
    )


def photographs(folder):
    for number in range(20):
        Image.fromarray(picture(number, 40)).save(folder / f"IMG_{number}.JPG")


def class_folders(folder):
    for number in range(24):
        (folder / "catdog"[number % 2 * 3 :][:3]).mkdir(exist_ok=True)
        Image.fromarray(picture(number)).save(folder / "catdog"[number % 2 * 3 :][:3] / f"{number}.png")


def gray_scans(folder):
    for number in range(20):
        Image.fromarray(picture(number)[..., 0]).save(folder / f"page {number}.png")


def deep_tiffs(folder):
    for number in range(20):
        Image.fromarray(picture(number)[..., 0].astype(np.uint16) * 257).save(folder / f"scan{number}.tif")


def flags(folder, *others):
    return [
        *SHORT,
        *SMALL,
        "--datadir",
        str(folder),
        "--save_root",
        str(folder.parent / "saved"),
        "--exp",
        "own",
        *others,
    ]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images")
    return tmp_path / "images"


def run_folder(images):
    return images.parent / "saved" / "latent_flow" / "folder" / "own"


def autoencoder_of(images):
    return images / "autoencoders" / "folder_16_f4c4"


@pytest.mark.parametrize(
    ("write", "others"),
    [
        (photographs, []),
        (class_folders, ["--num_classes", "2", "--label_dropout", "0.1"]),
        (gray_scans, []),
        (deep_tiffs, []),
    ],
    ids=["photographs", "class folders", "gray scans", "16-bit TIFFs"],
)
def test_one_command_trains_an_autoencoder_and_a_network(write, others, tmp_path, call):
    folder = tmp_path / "images"
    folder.mkdir()
    write(folder)
    code, out, err = call(SCRIPT, flags(folder, *others))
    assert code == 0, err
    assert "complete; sample with:\n  bash run_test.sh test_args/folder_small.txt" in out
    header = read_header(newest_model(run_folder(folder)))
    assert header.autoencoder.id == str(autoencoder_of(folder))
    assert header.num_classes == (2 if others else 1)
    assert (run_folder(folder) / "samples" / "step_0000002.png").exists()
    assert list((folder / "autoencoders" / "folder_16_f4c4.training" / "samples").iterdir())


def test_a_second_run_finds_the_autoencoder_and_the_same_images(images, call):
    call(SCRIPT, flags(images))
    weights = autoencoder_of(images) / "diffusion_pytorch_model.safetensors"
    before, first = weights.read_bytes(), read_weights(newest_model(run_folder(images)))[0]
    shutil.rmtree(run_folder(images))
    code, out, err = call(SCRIPT, flags(images))
    assert code == 0, err
    assert "found " in out
    assert "19 training images" in out  # grids of the autoencoder's training are not images of the data
    assert weights.read_bytes() == before
    assert weights_hash(read_weights(newest_model(run_folder(images)))[0]) == weights_hash(first)


def test_an_interrupted_training_of_the_autoencoder_resumes_with_the_same_command(images, call, monkeypatch):
    twin = images.parent / "twin" / "images"
    twin.parent.mkdir()
    shutil.copytree(images, twin)
    advance = AutoencoderState.advance

    def stopping(state, *arguments):
        advance(state, *arguments)
        if state.step == 1:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(AutoencoderState, "advance", stopping)
    code, out, _ = call(SCRIPT, flags(images))
    assert code != 0
    assert "interrupted; to resume, run the same command again" in out
    monkeypatch.undo()
    assert not run_folder(images).exists() or not list(run_folder(images).glob("*.safetensors"))
    for folder in (images, twin):
        assert call(SCRIPT, flags(folder))[0] == 0
    name = "diffusion_pytorch_model.safetensors"
    assert (autoencoder_of(images) / name).read_bytes() == (autoencoder_of(twin) / name).read_bytes()


def test_minutes_choose_the_number_of_steps_once(images, call, monkeypatch):
    limited = flags(images, "--minutes", "0.02", "--max_steps", "0")
    assert call(SCRIPT, limited)[0] == 0
    recorded = json.loads((run_folder(images) / "budget.json").read_text())
    assert recorded["minutes"] == 0.02
    assert read_header(newest_model(run_folder(images))).step == recorded["steps"]
    monkeypatch.setattr("training.loop.steps_within", lambda *_: 1 / 0)  # a resumed run does not measure
    code, out, err = call(SCRIPT, limited)
    assert code == 0, err
    assert "the run has already ended" in out + err


def test_samples_are_shown_next_to_their_nearest_training_images(images, call):
    plain, shown = flags(images), flags(images, "--show_neighbours")
    assert call(SCRIPT, plain)[0] == 0
    first = read_weights(newest_model(run_folder(images)))[0]
    shutil.rmtree(run_folder(images))
    code, _, err = call(SCRIPT, shown)
    assert code == 0, err
    assert weights_hash(read_weights(newest_model(run_folder(images)))[0]) == weights_hash(first)
    pairs = read_sheet(run_folder(images) / "samples" / "neighbours.png", 16, 3)
    samples = read_sheet(run_folder(images) / "samples" / "step_0000002.png", 16, 3)
    assert len(pairs) == 2 * len(samples)
    assert (pairs[0::2] == samples).all()


def test_minutes_and_max_steps_exclude_each_other(images, call):
    code, _, err = call(SCRIPT, flags(images, "--minutes", "3"))
    assert code == 2
    assert "--minutes and --max_steps both set the length of the run" in err


def test_sampling_refuses_the_name_own(images, call):
    assert call(SCRIPT, flags(images))[0] == 0
    source = ["--checkpoint", newest_model(run_folder(images)), "--n_sample", "2", "--batch_size", "2"]
    code, _, err = call("test_flow_latent.py", [*source, "--pretrained_autoencoder_ckpt", "own"])
    assert code == 2
    assert "own is for training scripts" in err


def test_changed_images_are_reported_and_flags_without_effect_too(images, call):
    assert call(SCRIPT, flags(images))[0] == 0
    Image.fromarray(picture(99, 40)).save(images / "IMG_99.JPG")
    shutil.rmtree(images / "latent_cache")
    code, out, err = call(SCRIPT, flags(images, "--exp", "other"))
    assert code == 0, err
    assert "19 then, 20 now" in out + err
    assert "--autoencoder_steps: no effect" in out + err


def test_the_advice_to_train_again_works(images, call):
    assert call(SCRIPT, flags(images))[0] == 0
    weights = autoencoder_of(images) / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(images / "autoencoders")
    code, _, err = call(SCRIPT, [*flags(images), "--exp", "other", "--autoencoder_steps", "5"])
    assert code == 0, err
    assert weights.read_bytes() != before
