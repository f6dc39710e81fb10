"""The header of a checkpoint: a dataclass with everything that the file records about itself.

`Header.to_json` and `Header.from_json` convert it to and from the file's JSON. Entries that older versions lack have
defaults, so their files still load. Entries unknown to this version raise an error that names them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from checkpoints.tasks import TASKS
from datasets_prep.image_dataset import DatasetFacts
from flow.auxiliary.losses import AuxiliaryOptions
from flow.losses.contrast import Correction
from flow.losses.options import FlowMatchingOptions, contrastive_weight
from flow.objectives import OBJECTIVES
from flow.paths import PathOptions
from models.autoencoders.protocol import AutoencoderFacts
from models.conditions import DenseInput
from models.family import FamilyOptions
from models.registry import NETWORKS, Architecture, options_from_header
from options import UsageError, as_json, make_options

__all__ = ["FORMAT", "Header", "PowerAverage", "PublishedForm"]

FORMAT = "latent-flow-1"
DERIVED = ("format", "latent_channels", "num_classes")  # for other readers; derived from the remaining entries


@dataclass(frozen=True)
class PowerAverage:
    """A power average of a run's weights (Karras et al. 2024, arXiv 2312.02696, section 3).

    Args:
        sigma_rel: standard deviation of the averaged updates' numbers, relative to `updates`.
        updates: number of averaged updates, from the start of the run.
    """

    sigma_rel: float
    updates: int


@dataclass(frozen=True)
class PublishedForm:
    """The form of the file that a checkpoint was converted from. Conversion back writes this form.

    Args:
        project: key of checkpoints.projects.registry.PROJECTS.
        entry: entry of the file that held the weights; "": the file itself.
        prefix: what all names started with, such as "module.".
    """

    project: str
    entry: str = ""
    prefix: str = ""


@dataclass(frozen=True)
class Header:
    """Everything that a checkpoint records about its network, data and training.

    Args:
        model_type: key of models.registry.NETWORKS.
        network: options of the network family.
        latent_size: side h = w of the latents.
        autoencoder: id, hash and scale of the autoencoder.
        dataset: name, image size, channels and class names of the dataset, and whether images may be mirrored.
        task: "generate", "inpaint" or "semantic".
        dense: the condition concatenated to x_t; None if there is none.
        path: options of the objective: the probability path and the distribution of training times.
        objective: key of flow.objectives.OBJECTIVES.
        contrast_means: mean latents that undo contrastive flow matching under guidance, flattened; empty without it.
        auxiliary: options of the auxiliary losses, for the record.
        encoder: id and hash of the image encoder whose features were aligned to, for the record; None without one.
        training: training options, for the record.
        precision, compiled, reproducible: how it was trained; reproducible is false for a run with a time limit.
        step, epoch: position in the run; None if a converted file does not record it.
        ended: whether training ran to its end.
        average: the power average that the weights are; None: they are the run's EMA.
        git, versions: commit, and versions of Python and libraries.
        published_file: name of LFM's or another project's checkpoint that this one was converted from.
        published_form: form of that file; None for LFM's.
        weights_sha256: hash of the weights, set by `save_weights`.
    """

    model_type: str
    network: FamilyOptions
    latent_size: int
    autoencoder: AutoencoderFacts
    dataset: DatasetFacts
    task: str = "generate"
    dense: DenseInput | None = None
    path: PathOptions = field(default_factory=FlowMatchingOptions)
    objective: str = "flow_matching"
    contrast_means: tuple[float, ...] = ()
    auxiliary: AuxiliaryOptions = AuxiliaryOptions()  # noqa: RUF009
    encoder: AutoencoderFacts | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    compiled: bool | None = None
    reproducible: bool | None = None
    step: int | None = None
    epoch: int | None = None
    ended: bool = False
    average: PowerAverage | None = None
    git: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    published_file: str | None = None
    published_form: PublishedForm | None = None
    weights_sha256: str | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Header":
        """Create a header from the JSON in a file of this version or an older one.

        Raises:
            UsageError: an entry is missing, unknown to this version, or has the wrong type.
        """
        values = {name: value for name, value in stored.items() if name not in DERIVED}
        try:
            if unknown := set(values) - {each.name for each in fields(cls)}:
                raise KeyError(", ".join(sorted(unknown)))
            _check_registered("network", values["model_type"], NETWORKS)
            _check_registered("objective", values.get("objective", "flow_matching"), OBJECTIVES)
            _check_registered("task", values.get("task", "generate"), TASKS)
            values["network"] = options_from_header(values["model_type"], values["network"])
            values["autoencoder"] = AutoencoderFacts.from_json(values["autoencoder"])
            values["dataset"] = DatasetFacts(**_tuples(values["dataset"]))
            objective = OBJECTIVES[values.get("objective", "flow_matching")]
            values["path"] = make_options(objective.options, values.get("path", {}))
            values["contrast_means"] = tuple(values.get("contrast_means", ()))
            values["auxiliary"] = make_options(AuxiliaryOptions, values.get("auxiliary", {}))
            for name, kind in {"dense": DenseInput, "average": PowerAverage, "published_form": PublishedForm}.items():
                values[name] = None if values.get(name) is None else kind(**values[name])
            if values.get("encoder") is not None:
                values["encoder"] = AutoencoderFacts.from_json(values["encoder"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(f"this version cannot read its header: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The JSON object stored in the file."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        derived = {"format": FORMAT, "latent_channels": self.latent_channels, "num_classes": self.num_classes}
        return as_json(derived | own)

    @property
    def architecture(self) -> Architecture:
        """The arguments of `build_network`, which determine the names and shapes of the weights."""
        return Architecture(self.model_type, self.latent_size, self.network, self.dense)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents and of the velocity."""
        return self.network.num_out_channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def num_classes(self) -> int:
        """Number of classes K, which is also the id of the null class; 1 if unconditional."""
        return self.network.classes

    @property
    def drops_labels(self) -> bool:
        """Whether training dropped labels, so that the network has learned the null class."""
        return self.network.label_dropout > 0

    @property
    def drops_dense(self) -> bool:
        """Whether training dropped the dense condition, so that the network has learned the null map."""
        return self.dense is not None and self.dense.dropout > 0

    def correction(self, device: torch.device | str = "cpu") -> Correction | None:
        """The correction of a network trained by contrastive flow matching, where guidance acts; None for others.

        Raises:
            UsageError: the header lacks the mean latents.
        """
        weight, numbers = contrastive_weight(self.path), math.prod(self.latent_shape)
        if not weight:
            return None
        if len(self.contrast_means) not in (numbers, self.num_classes * numbers):
            raise UsageError(
                f"contrast_means in the header has {len(self.contrast_means)} numbers, but the correction of contrastive flow "
                f"matching needs {numbers} for all classes together or for each: this file is damaged"
            )
        means = torch.tensor(self.contrast_means, device=device).view(-1, *self.latent_shape)
        return Correction(weight, means, null=self.num_classes)

    def at(self, step: int, epoch: int, ended: bool) -> "Header":
        """The header of a checkpoint at another position of the run."""
        return dataclasses.replace(self, step=step, epoch=epoch, ended=ended)


def _check_registered(kind: str, name: str, known: Mapping[str, Any]) -> None:
    """Check that `name` is registered, by this version or by an imported extension.

    Raises:
        UsageError: it is not; the message lists the registered names.
    """
    if name not in known:
        raise UsageError(
            f"unknown {kind} {name!r}: expected one of {', '.join(known)}. If one of your files registers it, import that "
            "file first (docs/extending.md)"
        )


def _tuples(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
