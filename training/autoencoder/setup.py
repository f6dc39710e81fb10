"""Construction of a run of autoencoder training: network, loss, state, and whether the run resumes."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets_prep.datasets import ImageDataset
from models.autoencoders.coding import Coder, Decoding, Encoding
from options import UsageError, as_json, resume_policy
from runtime.distributed import Processes
from runtime.messages import fact, note
from runtime.outputs import check_folder
from runtime.precision import Machine
from runtime.processes.parallel import replicate
from runtime.torch_files import read_torch_file
from runtime.weights import check_finite, weights_hash
from training.autoencoder.data import RememberedImages, padding
from training.autoencoder.losses import AutoencoderLoss, LossStep, make_loss
from training.autoencoder.networks import initial_network
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.output import check_output
from training.autoencoder.state import ENTRIES, AutoencoderState
from training.autoencoder.terms.protocol import LossSetup
from training.autoencoder.validation import VALIDATED, HeldOut, spread_images
from training.experiment import IMAGES, MACHINE, STATE_OF_IMAGES, Configuration
from training.reading.order import steps_per_epoch
from training.resources import DiskUse, check_space, optimizer_bytes
from training.resume import of_training_state
from training.state_file import CONTENT, has_state, read_newest
from training.tracking.trackers import check_tracker

__all__ = ["AutoencoderRun", "check_paths", "configuration_of", "initial_state", "prepare", "state_of_images"]


@dataclass
class AutoencoderRun:
    """The components of a run, which the loop uses. `network` has its initial weights and is on the machine's device."""

    folder: Path
    training: AutoencoderTrainingOptions
    source: ImageDataset
    images: RememberedImages
    network: Any
    coder: Coder
    loss: AutoencoderLoss
    loss_step: nn.Module
    held_out: HeldOut
    machine: Machine
    processes: Processes


def check_paths(options: AutoencoderTrainingOptions) -> None:
    """Check that the run's folders can be written and the tracker used.

    Raises:
        UsageError: they cannot.
    """
    check_output(options.output)
    check_folder(options.run_folder, "--output")
    check_tracker(options.tracker)


def prepare(
    dataset: ImageDataset,
    held_out: ImageDataset,
    options: AutoencoderTrainingOptions,
    machine: Machine,
    processes: Processes,
) -> AutoencoderRun:
    """Build the network and its loss.

    Raises:
        UsageError: the options contradict each other, the images or --initial_weights.
    """
    for split in (dataset, held_out):
        split.check_images("autoencoder training")
    network = initial_network(dataset.facts, options)
    steps_per_epoch(len(dataset), options.batch_size * processes.count)
    machine = machine.settled(math.inf if options.minutes else options.max_steps, processes)
    fact("machine", machine.describe())
    network.to(machine.device)
    if all(weights.dim() < 5 for weights in network.parameters()):  # without convolutions of videos
        network.to(memory_format=torch.channels_last)
    coder, border = _coder_of(network, options, machine), padding(dataset.facts)
    side = dataset.facts.image_size - 2 * border
    loss = make_loss(LossSetup(options, coder, machine, side, border, processes))
    images, channels = spread_images(held_out, VALIDATED), coder.layout.image_channels
    measured = HeldOut(held_out, images, channels, loss, machine, processes)
    step = replicate(LossStep(coder, loss, machine), processes, partly_used=bool(loss.modules))
    return AutoencoderRun(
        options.run_folder,
        options,
        dataset,
        RememberedImages(dataset),
        network,
        coder,
        loss,
        step,
        measured,
        machine,
        processes,
    )


def _coder_of(network: nn.Module, options: AutoencoderTrainingOptions, machine: Machine) -> Coder:
    """The network's encoder and decoder, compiled if the machine compiles and the loss allows it.

    An adaptive weight needs gradients of single layers, for which a compiled part would compute all of its gradients.
    """
    eager = replace(machine, compile=False)
    of_encoder, of_decoder = bool(options.align_weight), bool(options.align_weight or options.adversarial_weight)
    if machine.compile and of_decoder:
        note(f"the {'network' if of_encoder else 'decoder'} is not compiled, because a loss has an adaptive weight")
    encode = (eager if of_encoder else machine).compiled(Encoding(network))
    decode = (eager if of_decoder else machine).compiled(Decoding(network))
    return Coder(network, encode, decode)


def state_of_images(dataset: ImageDataset) -> str:
    """A hash that changes with the images; of a folder, also with their modification times."""
    return hashlib.sha256(dataset.fingerprint.encode()).hexdigest()[:12]


def configuration_of(run: AutoencoderRun) -> Configuration:
    """The contents of config.json: all options, resolved, and other facts that the results depend on."""
    facts, kind = run.source.facts, AutoencoderTrainingOptions
    initial = weights_hash(run.network.state_dict())[:12] if run.training.initial_weights else ""
    entries = {
        "precision": run.machine.precision,
        "compile": run.machine.compile,
        "processes": run.processes.count,
        "threads": torch.get_num_threads(),
        MACHINE: run.machine.describe_device(),
        "images of": f"{facts.name}, {facts.channels} x {facts.image_size} x {facts.image_size}, crop {facts.crop}",
        "mirror images": facts.flips,
        "initial weights": initial,
        IMAGES: len(run.source),
        STATE_OF_IMAGES: state_of_images(run.source),
    }
    fields = dataclasses.fields(kind)
    policies = {field.name: resume_policy(kind, field) for field in fields}
    policies |= {"precision": "on_request", "compile": "rounding"}
    if run.training.latent_noise or run.training.standardize_weight:
        policies["processes"] = "on_request"  # because each process measures its own batch's latents
    defaults = {field.name: field.default for field in fields}
    return Configuration({**as_json(run.training), **entries}, policies, defaults)


def initial_state(run: AutoencoderRun, resume: bool) -> AutoencoderState:
    """Create the state, or restore it from content.pth.

    Raises:
        UsageError: content.pth is unreadable or belongs to another network, or the disk is too small.
    """
    state = AutoencoderState(run.network, run.training, run.machine, run.loss.names, run.loss.modules)
    if resume and has_state(run.folder):

        def read(file: Path) -> dict[str, Any]:
            content = read_torch_file(file, run.machine.device)
            if not (isinstance(content, dict) and content.keys() >= ENTRIES):
                raise UsageError(
                    f"{file} is not a state of autoencoder training: expected {', '.join(sorted(ENTRIES))}"
                )
            with of_training_state(file):
                for part in (content["network"], content["ema"]["weights"]):
                    check_finite(part, file, state.network.state_dict())
            return content

        path, content = read_newest(run.folder / CONTENT, read, run.processes)
        with of_training_state(path):
            state.restore(content, run.processes)
        fact("start", f"resuming at step {state.step} from {path}")
    if run.processes.is_main:
        fact("disk", check_space(run.folder, _predict_use(state), "--output"))
    return state


def _predict_use(state: AutoencoderState) -> DiskUse:
    """The disk use of a run: two autoencoders and two training states."""
    weights = sum(tensor.nbytes for tensor in state.ema.weights.values())
    others = sum(tensor.nbytes for trained in state.modules.values() for tensor in trained.module.state_dict().values())
    content = 2 * weights + others + optimizer_bytes(state.all_optimizers)
    return DiskUse(weights, content, checkpoints=2, contents=2)
