"""Small autoencoders in training, for the tests of loss terms and for the two processes that compare them."""

from typing import Any

import timm
import torch
from safetensors.torch import save_file

from models.autoencoders.coding import Coder
from models.autoencoders.kl import new_autoencoder_kl
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.processes.parallel import replicate
from runtime.randomness import StepDraws
from tests.training.autoencoder.small_images import CPU, blobs
from training.autoencoder.data import PixelBatch
from training.autoencoder.losses import LossStep, make_loss
from training.autoencoder.run import autoencoder_options
from training.autoencoder.state import AutoencoderState
from training.autoencoder.terms.protocol import LossSetup

SIDE, BATCH = 16, 4
ADVERSARIAL = {
    "adversarial_weight": 0.5,
    "adversarial_start": 2,
    "discriminator_lead": 1,
    "discriminator_width": 16,
    "discriminator_layers": 1,
    "discriminator_lr": 1e-3,
}


def aligned(folder):
    """Options that align latents to a small vision transformer with random weights, saved in `folder`."""
    path = folder / "encoder.safetensors"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(timm.create_model("test_vit").state_dict(), path)
    return {"align_weight": 0.1, "align_encoder": "test_vit", "align_encoder_weights": str(path)}


class SmallRun:
    """An autoencoder with two latent channels and factor 2, and its training state."""

    def __init__(self, processes: Processes = Processes(), machine: Machine = CPU, **values: Any) -> None:  # noqa: B008
        self.options = autoencoder_options(**{"lr": 1e-3, "lr_schedule": "constant", "batch_size": BATCH, **values})
        self.options.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = new_autoencoder_kl(1, (8, 16), 2, SIDE, {})
        self.coder = Coder(self.network)
        self.loss = make_loss(LossSetup(self.options, self.coder, machine, SIDE, 0, processes))
        self.step = LossStep(self.coder, self.loss, machine)
        self.state = AutoencoderState(self.network, self.options, machine, self.loss.names, self.loss.modules)
        self._wrapped = replicate(self.step, processes, partly_used=bool(self.loss.modules))
        self._processes = processes

    def batch(self, number: int) -> PixelBatch:
        """The batch of a step; several processes share it."""
        count = BATCH * 2
        share = count // self._processes.count
        rows = slice(self._processes.rank * share, (self._processes.rank + 1) * share)
        pixels = blobs(64, SIDE)[number * count : (number + 1) * count][rows].float() / 127.5 - 1
        return PixelBatch(pixels, StepDraws(0, number, rows, count))

    def evaluate(self, number: int) -> Any:
        """The losses of a step, without an update."""
        return self.step(*self.batch(number), number)

    def advance(self, steps: int, rate: float = 1e-3) -> "SmallRun":
        """Take steps."""
        for _ in range(steps):
            self.state.advance(self._wrapped, self.batch(self.state.step), rate)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """All trained weights, the average and the optimizers' moments, by name."""
        content, found = self.state.content(), {}
        found |= {f"network {name}": value for name, value in content["network"].items()}
        found |= {f"average {name}": value for name, value in content["ema"]["weights"].items()}
        for name, stored in content["modules"].items():
            found |= {f"{name} {key}": value for key, value in stored["module"].items()}
            for number, moments in stored["optimizer"]["state"].items():
                found |= {f"{name} {number} {key}": value for key, value in moments.items()}
        return {name: value.clone() for name, value in found.items()}


def gradients(run, loss, weights=None):
    """The gradients of a loss, zeros where there is none."""
    weights = list(run.network.parameters()) if weights is None else weights
    return torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
