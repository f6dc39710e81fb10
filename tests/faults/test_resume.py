"""A run that is interrupted or crashes resumes bit for bit, in all training configurations.

See tests/training/test_parallel.py and test_processes.py for two processes, and tests/test_scripts.py for killed processes.
"""

import os
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from checkpoints.experiments import newest_model
from command_line import parse_options
from exits import INTERRUPTED
from models.autoencoders.kl import new_autoencoder_kl
from runtime.distributed import Processes
from runtime.torch_files import read_torch_file
from tasks.inpainting import INPAINTING
from tasks.semantic_synthesis import SEMANTIC_SYNTHESIS
from tasks.task import GENERATION
from tests.training.test_loop import assert_same_run, state_of
from training import setup
from training.script import IGNORED_FLAGS, run_training

pytestmark = pytest.mark.usefixtures("process_restored")
COUNT, STEPS, FETCH = 40, 14, 12  # five steps per epoch; the fault occurs when the batch of step 12 is read
LATENT = ["--pretrained_autoencoder_ckpt", "{place}/ae", "--model_type", "DiT-Mi/4", "--num_classes", 10]
PIXELS = ["--pretrained_autoencoder_ckpt", "none", "--model_type", "DiT-Mi/8", "--num_classes", 10]
UNET = [
    "--pretrained_autoencoder_ckpt",
    "none",
    "--model_type",
    "adm",
    "--nf",
    32,
    "--ch_mult",
    1,
    1,
    "--num_res_blocks",
    1,
]
AUXILIARY = ["--tap_block", 2, "--auxiliary_velocity", 0.5, "--align_latents", 1, "--align_features", 0.5]
AUXILIARY += [
    "--align_encoder",
    "test_vit",
    "--align_encoder_weights",
    "{place}/encoder.safetensors",
    "--align_hidden",
    16,
]
AUXILIARY += ["--dispersive", 0.25, "--route_blocks", 2, 5, "--route_rate", 0.5, "--auxiliary_until", 13]
CONFIGURATIONS = {
    "latent cache": (GENERATION, LATENT),
    "encoded on the fly by three workers": (GENERATION, [*LATENT, "--no_latent_cache", "--num_workers", 3]),
    "gradient accumulation and two optimizers": (
        GENERATION,
        [*PIXELS, "--grad_accumulation", 2, "--optimizer", "muon", "--grad_clip", 0.1, "--warmup_steps", 12],
    ),
    "without EMA": (GENERATION, [*PIXELS, "--no-use_ema", "--lr_schedule", "trapezoid"]),
    "dropout in the network": (GENERATION, [*UNET, "--label_dim", 10, "--dropout", 0.3, "--grad_accumulation", 2]),
    "compiled, in bfloat16": (GENERATION, [*PIXELS, "--precision", "bf16", "--compile"]),
    "compiled, with auxiliary heads and routing": (
        GENERATION,
        [*PIXELS, *AUXILIARY, "--precision", "bf16", "--compile", "--grad_accumulation", 2],
    ),
    "scaled losses in float16": (GENERATION, [*PIXELS, "--precision", "fp16", "--optimizer", "muon"]),
    "auxiliary heads, an image encoder and routing": (GENERATION, [*LATENT, *AUXILIARY]),
    "inpainting": (INPAINTING, [*PIXELS, "--condition_dropout", 0.3]),
    "label maps": (SEMANTIC_SYNTHESIS, [*PIXELS, "--condition_dropout", 0.3, "--grad_accumulation", 2]),
}
OFTEN = [
    "--save_content_every_steps",
    3,
    "--log_every",
    1,
    "--eval_every",
    1,
    "--plot_every",
    1,
    "--save_ckpt_every",
    1,
]


USUAL = "encoded on the fly by three workers"
FAST = (USUAL, "auxiliary heads, an image encoder and routing")
SOME_SLOW = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]


class PowerCutError(Exception):
    """Simulates a power cut: the run ends without cleaning up."""


def power_cut():
    raise PowerCutError


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class FaultySource:
    """A source of moments that calls `event` at call number FETCH."""

    def __init__(self, source, event):
        self._source, self._event, self._calls = source, event, 0

    def __len__(self):
        return len(self._source)

    @property
    def labels(self):
        return self._source.labels

    def moments(self, indices, mirrored):
        self._calls += 1
        if self._calls == FETCH:
            self._event()
        return self._source.moments(indices, mirrored)


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("resume")
    write_idx(place / "data", {"train": COUNT, "t10k": 10})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": 0.5}).save_pretrained(place / "ae")
        save_file(timm.create_model("test_vit").state_dict(), place / "encoder.safetensors")
    return place


def start(place, configuration, exp, event=None):
    """Start or resume training in a configuration. Returns exit code and run folder."""
    task, flags = CONFIGURATIONS[configuration]
    shared = ["--dataset", "fashion_mnist", "--datadir", place / "data", "--batch_size", 8, "--label_dropout", 0.3]
    shared += ["--max_steps", STEPS, "--lr", 1e-2, "--method", "euler", "--num_steps", 1, "--precision", "fp32"]
    shared += ["--num_threads", 1, "--device", "cpu", "--save_root", place / "saved", "--exp", exp, *OFTEN]
    words = [str(word).format(place=place) for word in (*shared, *flags)]
    groups = [*setup.training_groups(), *task.options]
    options = parse_options("", groups, words, ignored=IGNORED_FLAGS, task=task.task.name)
    folder = place / "saved" / task.task.runs / "fashion_mnist" / exp
    with pytest.MonkeyPatch.context() as patch:
        opened = setup.open_moments
        if event:  # training images are opened first, then held-out images
            sources = iter([lambda source: FaultySource(source, event), lambda source: source])
            patch.setattr(setup, "open_moments", lambda *arguments: next(sources)(opened(*arguments)))
        return run_training(task, options, Processes()), folder


@pytest.fixture(scope="module")
def reference_run(place):
    """`reference_run(configuration)` returns the run folder of an uninterrupted run."""
    folders = {}

    def run(configuration):
        if configuration not in folders:
            code, folders[configuration] = start(place, configuration, f"whole_{len(folders)}")
            assert code == 0
        return folders[configuration]

    return run


@pytest.mark.parametrize("configuration", SOME_SLOW)
def test_a_run_that_lost_its_power_goes_on_to_the_same_bits(place, reference_run, configuration):
    exp = f"lost_{list(CONFIGURATIONS).index(configuration)}"
    with pytest.raises(PowerCutError):
        start(place, configuration, exp, power_cut)
    folder = place / "saved" / CONFIGURATIONS[configuration][0].task.runs / "fashion_mnist" / exp
    assert read_torch_file(folder / "content.pth")["step"] == 9
    with (folder / "metrics.jsonl").open("a") as file:  # leftovers of a crashed process
        file.write('{"step": 1')
    (folder / "content.pth.tmp-1").write_bytes(b"half of it")
    assert start(place, configuration, exp)[0] == 0
    assert_same_run(folder, reference_run(configuration))
    assert not (folder / "content.pth.tmp-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(place, reference_run, configuration):
    exp = f"interrupted_{list(CONFIGURATIONS).index(configuration)}"
    code, folder = start(place, configuration, exp, ctrl_c)
    assert code == INTERRUPTED
    assert read_torch_file(folder / "content.pth")["step"] in (FETCH - 1, FETCH)
    assert start(place, configuration, exp)[0] == 0
    assert_same_run(folder, reference_run(configuration))


@pytest.mark.parametrize("record", ["checkpoint", "reconstructions"])
def test_a_run_keeps_the_scale_of_its_latents(place, reference_run, record):
    """The autoencoder's configuration may be edited, or read otherwise by another version."""
    exp = f"rescaled_{record}"
    with pytest.raises(PowerCutError):
        start(place, USUAL, exp, power_cut)
    folder = place / "saved" / "latent_flow" / "fashion_mnist" / exp
    if record == "reconstructions":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    else:
        (folder / "best.safetensors").write_bytes(b"damaged")
    config = place / "ae" / "config.json"
    original = config.read_text()
    assert '"scaling_factor": 0.5' in original
    config.write_text(original.replace('"scaling_factor": 0.5', '"scaling_factor": 0.125'))
    try:
        assert start(place, USUAL, exp)[0] == 0
    finally:
        config.write_text(original)
    assert state_of(folder) == state_of(reference_run(USUAL))
    newest = newest_model(folder)
    assert newest.read_bytes() == (reference_run(USUAL) / newest.name).read_bytes()


def test_a_resumed_run_with_other_autoencoder_weights_is_a_warning(place, capsys):
    with pytest.raises(PowerCutError):
        start(place, USUAL, "other_weights", power_cut)
    path = place / "ae" / "diffusion_pytorch_model.safetensors"
    original = path.read_bytes()
    weights = load_file(path)
    save_file({name: value * 1.01 for name, value in weights.items()}, path)
    try:
        assert start(place, USUAL, "other_weights")[0] == 0
    finally:
        path.write_bytes(original)
    assert "now has other weights" in capsys.readouterr().err
