"""Training of the small classifier whose features score Fashion-MNIST samples.

The loss is cross-entropy with label smoothing, on randomly shifted and mirrored training images. The EMA weights are saved.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from datasets_prep.datasets import ImageDataset, crop_padding
from evaluation.features.classifier import ARCHITECTURES, SIDE, FashionClassifier
from models.autoencoders.pixels import images_to_pixels
from options import UsageError, option
from runtime.messages import show
from runtime.precision import Machine
from runtime.progress import progress_bar
from runtime.randomness import generator_for
from training.ema import Ema
from training.nan_guard import check_loss, check_trained
from training.schedules import SCHEDULES, learning_rate

__all__ = ["ClassifierTrainingOptions", "accuracy", "gather_images", "train_classifier"]


@dataclass(frozen=True)
class ClassifierTrainingOptions:
    """Classifier training."""

    output: str = option("classifier.safetensors", "output file")
    architecture: str = option(
        "residual", "residual: levels of convolutions; patches: a transformer", choices=ARCHITECTURES
    )
    widths: tuple[int, ...] = option(
        (16, 32, 64, 128),
        "residual: channels of the stem and of each level, which halves the resolution; patches: the width, once per block",
    )
    batch_size: int = option(128, "images per step", minimum=2)
    max_steps: int = option(6000, "optimizer steps", minimum=1)
    lr: float = option(4e-3, "learning rate", minimum=0)
    lr_schedule: str = option("cosine", "learning-rate schedule", choices=SCHEDULES)
    weight_decay: float = option(0.05, "decoupled weight decay, multiplied by the learning rate", minimum=0)
    label_smoothing: float = option(0.1, "label smoothing: probability spread evenly over all classes", minimum=0)
    max_shift: int = option(2, "largest random shift, in pixels", minimum=0)
    mirror: bool = option(True, "mirror each image with probability 1/2")
    ema_decay: float = option(
        0.998, "decay of the exponential moving average (EMA) of the weights, which is saved", minimum=0
    )
    seed: int = option(0, "seed of the initial weights, the data order and the augmentation")


def gather_images(dataset: ImageDataset) -> torch.Tensor:
    """Gather all images of a gray 28 x 28 dataset, without padding, in one uint8 tensor [N, 1, 28, 28].

    Raises:
        UsageError: the images have another size or are in color.
    """
    images = crop_padding(torch.stack([dataset[i] for i in range(len(dataset))]), dataset.facts)
    if images.shape[1:] != (1, SIDE, SIDE):
        found = " x ".join(map(str, images.shape[1:]))
        raise UsageError(f"the classifier requires images of 1 x {SIDE} x {SIDE}, but the dataset's are {found}")
    return images


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: tuple[str, ...],
    options: ClassifierTrainingOptions,
    machine: Machine,
) -> FashionClassifier:
    """Train on images uint8 [N, 1, 28, 28] with labels [N].

    Returns:
        The network with its EMA weights, rounded to float16.

    Raises:
        UsageError: the batch size exceeds the number of images.
        DivergedError: the loss or the trained weights are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = FashionClassifier(options.widths, classes, options.architecture)
    network = network.to(machine.device).to(memory_format=torch.channels_last)
    ema = Ema(network, options.ema_decay)
    optimizer = torch.optim.AdamW(network.parameters(), options.lr, weight_decay=options.weight_decay, fused=True)
    batches = _augmented_batches(images, labels, options)

    progress = progress_bar(range(options.max_steps), desc="classifier", unit="step")
    started = time.perf_counter()
    for step in progress:
        rate = learning_rate(options.lr_schedule, options.lr, step, options.max_steps, warmup=200)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen, targets = next(batches)
        pixels = images_to_pixels(chosen.to(machine.device, memory_format=torch.channels_last))
        with machine.autocast():
            logits = network(pixels)
        targets = targets.to(machine.device)
        loss = functional.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network)
        if step % 100 == 0:
            check_loss(loss.item(), step)
            progress.set_postfix(loss=f"{loss.item():.3f}")
    check_loss(loss.item(), options.max_steps)
    network.load_state_dict(ema.weights)
    seconds = time.perf_counter() - started
    show(f"trained {options.max_steps} steps of {options.batch_size} images in {seconds / 60:.1f} min")
    network = network.half().float().eval()
    check_trained(network, "classifier")
    return network


@torch.no_grad()
def accuracy(network: FashionClassifier, images: torch.Tensor, labels: torch.Tensor, machine: Machine) -> float:
    """Accuracy in [0, 1] on images uint8 [N, 1, 28, 28] with labels [N], in float32."""
    hits = 0
    for part, truth in zip(images.split(500), labels.split(500), strict=True):
        hits += int((network(images_to_pixels(part).to(machine.device)).argmax(1).cpu() == truth).sum())
    return hits / len(labels)


def _augmented_batches(
    images: torch.Tensor, labels: torch.Tensor, options: ClassifierTrainingOptions
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of randomly shifted and mirrored images endlessly. Every epoch has a new random order."""
    count, size, shift = len(images), options.batch_size, options.max_shift
    if count < size:
        raise UsageError(f"--batch_size {size} is larger than the dataset of {count} images: choose a smaller one")
    padded = functional.pad(images[:, 0], [shift] * 4)
    side = torch.arange(SIDE)
    epoch = 0
    while True:
        generator = generator_for(options.seed, "order", epoch)
        for chosen in torch.randperm(count, generator=generator)[: count // size * size].split(size):
            down, right = torch.randint(2 * shift + 1, (2, size, 1), generator=generator)
            mirrored = torch.rand(size, 1, generator=generator) < (0.5 if options.mirror else 0)
            rows = down + side
            columns = right + torch.where(mirrored, side.flip(0), side)
            yield padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]][:, None], labels[chosen]
        epoch += 1
