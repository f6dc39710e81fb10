"""Training batches as functions of (seed, step, index in the global batch).

A step's random numbers are drawn for the global batch, and each process uses its own slice. N processes therefore train on
the same data as one process, and a resumed run on the same data as an uninterrupted one. No random state is saved.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from datasets_prep.augmentation.variants import AugmentedMoments
from datasets_prep.conditions import ConditionSource
from datasets_prep.moments import MomentSource
from datasets_prep.pairs.pair_cache import PairCache
from flow.auxiliary.objective import replace_draws
from flow.couplings import COUPLINGS
from flow.flow_maps.options import guides_targets
from flow.losses.contrast import next_of_another_class
from flow.losses.options import contrastive_weight
from flow.objectives import Draws, Objective
from flow.paths import PathOptions, straight_velocity
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition, drop_labels, null_condition
from runtime.distributed import Processes
from runtime.randomness import generator_for
from training.reading.ahead import read_ahead
from training.reading.order import image_order

__all__ = [
    "Batch",
    "StepStreams",
    "batches",
    "select_rows",
]

T = TypeVar("T")
Columns = TypeVar("Columns", bound=tuple)


class Batch(NamedTuple):
    """One process's batch: data and noise [B, c, h, w], the objective's draws [B], and the condition.

    In the condition, dropped labels are replaced by the null class and dropped maps by zeros.
    """

    data: torch.Tensor
    noise: torch.Tensor
    draws: Draws
    condition: Condition

    def split(self, count: int) -> "list[Batch]":
        """Split the batch into `count` equal parts.

        Raises:
            ValueError: `count` does not divide the batch size.
        """
        size, remainder = divmod(len(self.data), count)
        if remainder:
            raise ValueError(f"a batch of {len(self.data)} cannot be split into {count} equal parts")
        parts = [slice(first, first + size) for first in range(0, len(self.data), size)]
        return [
            Batch(self.data[p], self.noise[p], select_rows(self.draws, p), select_rows(self.condition, p))
            for p in parts
        ]


def select_rows(columns: Columns, part: slice) -> Columns:
    """Select rows of a named tuple whose fields are tensors, None or further named tuples."""

    def select(column: Any) -> Any:
        if column is None:
            return None
        return select_rows(column, part) if isinstance(column, tuple) else column[part]

    return type(columns)(*map(select, columns))


class StepStreams:
    """The random numbers of one step, for the global batch.

    The purposes "time", "dropout", "posterior", "noise" and "condition" share one generator and are drawn in this order, so
    that runs of the first version resume exactly. Every other purpose has a separate generator that is seeded with its name,
    so a new purpose does not change the numbers of other purposes.

    Args:
        seed: the run's seed.
        step: number of the step, from 0.
        count: N, samples in the global batch.
        shape: (c, h, w) of the latents.
        device: where the numbers are drawn.
        last_step: number of steps of the run, for schedules.
    """

    def __init__(
        self, seed: int, step: int, count: int, shape: Sequence[int], device: torch.device, last_step: int = 1
    ) -> None:
        self.step, self.last_step = step, last_step
        self._keys = seed, step
        self._shape = count, *shape
        self._device = device
        self._first = generator_for(seed, "step", step, device=device)
        time, dropout = torch.rand(2, count, generator=self._first, device=device)
        self._uniform = {"time": time, "dropout": dropout}
        self._normal = {purpose: self._randn(self._first) for purpose in ("posterior", "noise")}

    def uniform(self, purpose: str) -> torch.Tensor:
        """Uniform numbers [N] in [0, 1)."""
        if purpose not in self._uniform:
            generator = self._own_generator("uniform", purpose)
            self._uniform[purpose] = torch.rand(self._shape[0], generator=generator, device=self._device)
        return self._uniform[purpose]

    def normal(self, purpose: str) -> torch.Tensor:
        """Standard normal numbers [N, c, h, w]."""
        if purpose not in self._normal:
            own = purpose != "condition"
            self._normal[purpose] = self._randn(self._own_generator("normal", purpose) if own else self._first)
        return self._normal[purpose]

    def number(self, purpose: str) -> float:
        """A uniform number in [0, 1) for the whole step, drawn on the CPU, so that the host does not wait for a device."""
        seed, step = self._keys
        return torch.rand((), generator=generator_for(seed, "step", step, "number", purpose)).item()

    def _own_generator(self, kind: str, purpose: str) -> torch.Generator:
        seed, step = self._keys
        return generator_for(seed, "step", step, kind, purpose, device=self._device)

    def _randn(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self._shape, generator=generator, device=self._device)


def batches(
    source: MomentSource,
    autoencoder: Autoencoder,
    objective: Objective,
    *,
    batch_size: int,
    first_step: int,
    last_step: int,
    seed: int,
    flips: bool,
    num_classes: int,
    label_dropout: float,
    device: torch.device,
    processes: Processes,
    condition: ConditionSource | None = None,
    condition_dropout: float = 0.0,
    path: PathOptions = PathOptions(),  # noqa: B008
    features: MomentSource | None = None,
) -> Iterator[Batch]:
    """Yield this process's batches of the steps first_step .. last_step - 1. A thread reads the data one step ahead.

    Args:
        source: posterior moments by image index, or pairs of noise and samples. `AugmentedMoments` also give the condition
            the parameters of augmentation.
        autoencoder: samples the posterior and scales the latents.
        objective: draws its times from the step's random streams.
        batch_size: images per process.
        first_step: the step to start at.
        last_step: the step to stop before.
        seed: seed of all random numbers.
        flips: whether to mirror each image with probability 1/2.
        num_classes: K, which is also the null class's id.
        label_dropout: probability of replacing a label by the null class.
        device: device of the batches.
        processes: this process takes slice `rank` of every global batch.
        condition: dense conditions by image index. Their random draws are numbered consecutively across global batches.
        condition_dropout: probability of replacing a dense map by zeros.
        path: the objective's options. Their coupling pairs data and noise, and with a contrastive weight, the draws get
            velocities of other samples of the global batch. With guided targets, they get the null condition.
        features: an image encoder's features by image index, for the field `features` of the objective's draws.
    """
    global_batch = batch_size * processes.count
    share = slice(processes.rank * batch_size, (processes.rank + 1) * batch_size)
    choose = image_order(seed, len(source), global_batch, flips)
    couple, contrast, guided = COUPLINGS[path.coupling], contrastive_weight(path), guides_targets(path)

    pin = device.type != "cpu"  # so that the host does not wait for copies to the device

    def reader(step: int) -> Callable[[], _Read]:
        draws = range(step * global_batch + share.start, step * global_batch + share.stop)
        chosen, mirrored = choose(step)
        if isinstance(source, AugmentedMoments):
            chosen = source.choose_variants(chosen, seed, step)
        rows, others = _rows_with_others(source.labels[chosen], share) if contrast else (None, None)
        own = share if rows is None else rows
        return partial(_read, source, condition, features, chosen[own], mirrored[own], draws, rows, others, pin)

    for step, (moments, labels, raw, encoded, rows, others, augmentation) in read_ahead(
        reader, first_step, last_step, device
    ):
        moments, labels = moments.to(device, non_blocking=True), labels[:batch_size].to(device, non_blocking=True)
        own = share if rows is None else rows.to(device, non_blocking=True)
        augmentation = None if augmentation is None else augmentation.to(device, non_blocking=True)
        shape = autoencoder.latent_channels, *moments.shape[2:]
        streams = StepStreams(seed, step, global_batch, shape, device, last_step)
        dropout = streams.uniform("dropout")[share]  # for labels and maps, so that guidance moves away from both
        dense = None
        if condition is not None and raw is not None:
            dense = condition.encode(raw, streams.normal("condition")[share])
            dense = dense * (dropout >= condition_dropout).view(-1, 1, 1, 1)
        if isinstance(source, PairCache):
            data, noise = source.split(moments)
        else:
            data, noise = autoencoder.sample(moments, streams.normal("posterior")[own]), streams.normal("noise")[own]
        if couple is not None:
            chosen = couple(data[:batch_size], noise[:batch_size], labels)
            noise = torch.cat([noise[chosen], noise[batch_size:]])
        draws: Any = select_rows(objective.draw(streams), share)
        if encoded is not None:
            draws = draws._replace(features=encoded.to(device, non_blocking=True))
        if others is not None:
            kept = dropout >= max(label_dropout, condition_dropout)
            others = others.to(device, non_blocking=True)
            velocities = straight_velocity(data, noise, path.sigma_min)[others]
            draws = replace_draws(draws, other_velocity=velocities, contrast=contrast * kept)
        if guided:
            null = null_condition(labels, dense, label_dropout, condition_dropout, num_classes)
            null = null._replace(augmentation=augmentation)
            draws = replace_draws(draws, kept=dropout >= max(label_dropout, condition_dropout), null=null)
        labels = drop_labels(labels, dropout, label_dropout, num_classes)
        yield Batch(data[:batch_size], noise[:batch_size], draws, Condition(labels, dense, augmentation))


def _rows_with_others(labels: torch.Tensor, share: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the global batch that a process reads for contrastive flow matching.

    Args:
        labels: of the global batch [N].
        share: the process's own rows.

    Returns:
        The own rows, followed by those of other processes [M]; and for each own row, the position of the other sample there.
    """
    others, own = next_of_another_class(labels)[share], torch.arange(len(labels))[share]
    rows = torch.cat([own, others[(others < own[0]) | (others > own[-1])].unique()])
    position = torch.empty_like(labels)
    position[rows] = torch.arange(len(rows))
    return rows, position[others]


class _Read(NamedTuple):
    """The data of a process's batch.

    Args:
        moments: of the own samples, and of other processes' samples that the loss needs [M, ...].
        labels: [M].
        raw: the own conditions before encoding [B, ...].
        features: an image encoder's features of the own samples [B, ...].
        rows: rows of the global batch [M]; None: the own ones.
        others: see `_rows_with_others`; None without contrastive flow matching.
        augmentation: parameters of the own samples' augmentation [B, P]; None without augmentation.
    """

    moments: torch.Tensor
    labels: torch.Tensor
    raw: torch.Tensor | None
    features: torch.Tensor | None
    rows: torch.Tensor | None
    others: torch.Tensor | None
    augmentation: torch.Tensor | None


def _read(
    source: MomentSource,
    condition: ConditionSource | None,
    features: MomentSource | None,
    chosen: torch.Tensor,
    mirrored: torch.Tensor,
    draws: Sequence[int],
    rows: torch.Tensor | None,
    others: torch.Tensor | None,
    pin: bool,
) -> _Read:
    own, own_mirrored = chosen[: len(draws)], mirrored[: len(draws)]
    raw = None if condition is None else condition.read(own, own_mirrored, draws)
    encoded = None if features is None else features.moments(own, own_mirrored)
    augmentation = source.parameters(own) if isinstance(source, AugmentedMoments) else None
    read = _Read(source.moments(chosen, mirrored), source.labels[chosen], raw, encoded, rows, others, augmentation)
    if not pin:
        return read
    return _Read(*(x if x is None or x.device.type != "cpu" else x.pin_memory() for x in read))  # type: ignore[arg-type]
