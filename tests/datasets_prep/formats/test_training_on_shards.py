"""A training run on LightningDiT's latents: its checkpoint records their scale, and a resume has the same bits."""

import numpy as np
import pytest
import torch

from checkpoints.experiments import newest_model
from checkpoints.files import load_model
from command_line import parse_options
from models.autoencoders.kl import new_autoencoder_kl
from runtime.distributed import Processes
from tasks.task import GENERATION
from tests.written_formats import write_lightningdit
from training.script import run_training
from training.setup import training_groups

pytestmark = pytest.mark.usefixtures("process_restored")


def test_a_run_records_the_scale_and_resumes_to_the_same_bits(tmp_path):
    values = np.random.default_rng(0).normal(2, 3, (2, 42, 2, 8, 8)).astype(np.float32)
    latents, mirrored = map(torch.from_numpy, values)
    write_lightningdit(tmp_path / "data", latents, [row % 2 for row in range(42)], mirrored)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8), 2, 16, {}).save_pretrained(tmp_path / "ae")

    def train(name, steps):
        flags = ["--dataset", "folder", "--datadir", tmp_path / "data", "--image_size", 16, "--exp", name]
        flags += ["--pretrained_autoencoder_ckpt", tmp_path / "ae", "--model_type", "DiT-Mi/2", "--num_classes", 2]
        flags += [
            "--save_root",
            tmp_path,
            "--batch_size",
            8,
            "--max_steps",
            steps,
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--no-compile",
        ]
        flags += ["--grid_samples", 2, "--method", "euler", "--num_steps", 1, "--lr_schedule", "constant"]
        flags += ["--resume"] if steps == 2 and name == "parts" else []
        options = parse_options("", training_groups(), list(map(str, flags)))
        assert run_training(GENERATION, options, Processes()) == 0
        return load_model(newest_model(tmp_path / "latent_flow" / "folder" / name), "cpu")

    whole, _ = train("whole", 2), train("parts", 1)
    resumed = train("parts", 2)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    facts = whole.header.autoencoder
    assert facts.latents_mean == pytest.approx(latents.mean((0, 2, 3)).tolist())
    assert facts.latents_std == pytest.approx(latents.std((0, 2, 3)).tolist())
    decoded = whole.autoencoder.decode(torch.zeros(1, 2, 8, 8))
    mean = latents.mean((0, 2, 3)).view(1, -1, 1, 1).expand(1, 2, 8, 8)
    network = whole.autoencoder.network
    torch.testing.assert_close(decoded, network.decode(mean).sample, atol=1e-5, rtol=1e-4)
