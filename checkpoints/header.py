"""The header of a checkpoint: everything that a file records about itself, as one dataclass.

It is JSON only at the edge of the file, in `Header.to_json` and `Header.from_json`. Entries that older versions lacked have
defaults, so their files keep loading; entries that this version does not know are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from checkpoints.tasks import TASKS
from datasets_prep.image_dataset import DatasetFacts
from flow.objectives import OBJECTIVES
from flow.paths import PathOptions
from models.autoencoders.protocol import AutoencoderFacts
from models.conditions import DenseInput
from models.family import FamilyOptions
from models.registry import NETWORKS, Architecture, options_from_header
from options import UsageError, as_json, make_options

__all__ = ["FORMAT", "Header"]

FORMAT = "latent-flow-1"
DERIVED = ("format", "latent_channels", "num_classes")  # entries of the file that follow from others


@dataclass(frozen=True)
class Header:
    """The record of a checkpoint.

    Args:
        model_type: key of models.registry.NETWORKS.
        network: the family's options.
        latent_size: side h = w of the latents.
        autoencoder: its identity, hash and scale.
        dataset: name, side and channels of the images, class names, whether mirror images belong to it.
        task: "generate", "inpaint" or "semantic".
        dense: what the network sees next to x_t; None: nothing.
        path: the objective's options: the probability path, and the distribution of training times.
        objective: key of flow.objectives.OBJECTIVES.
        training: the options of training, for the record.
        precision, compiled, reproducible: how it was trained; reproducible is false for a run that the clock ended.
        step, epoch: the position; None if a converted file does not record it.
        ended: whether the run was trained to its end.
        git, versions: commit, and versions of Python and the libraries.
        published_file: name of the file of the published LFM code that it was converted from.
        weights_sha256: hash of the weights; `save_weights` fills it in.
    """

    model_type: str
    network: FamilyOptions
    latent_size: int
    autoencoder: AutoencoderFacts
    dataset: DatasetFacts
    task: str = "generate"
    dense: DenseInput | None = None
    path: PathOptions = field(default_factory=PathOptions)
    objective: str = "flow_matching"
    training: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    compiled: bool | None = None
    reproducible: bool | None = None
    step: int | None = None
    epoch: int | None = None
    ended: bool = False
    git: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    published_file: str | None = None
    weights_sha256: str | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Header":
        """The header in a file's JSON, this version's or an older one's.

        Raises:
            UsageError: an entry is missing, unknown to this version or of another kind.
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
            dense = values.get("dense")
            return cls(**values | {"dense": None if dense is None else DenseInput(**dense)})
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(f"this version cannot read its header: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The JSON object that a file stores."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        derived = {"format": FORMAT, "latent_channels": self.latent_channels, "num_classes": self.num_classes}
        return as_json(derived | own)

    @property
    def architecture(self) -> Architecture:
        """The arguments of `build_network`, which determine the weights' names and shapes."""
        return Architecture(self.model_type, self.latent_size, self.network, self.dense)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, and so of the velocity."""
        return self.network.num_out_channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def num_classes(self) -> int:
        """K, which is also the null class's id; 1: unconditional."""
        return self.network.classes

    @property
    def drops_labels(self) -> bool:
        """Whether training dropped labels, so that the network knows the null class."""
        return self.network.label_dropout > 0

    @property
    def drops_dense(self) -> bool:
        """Whether training hid the dense condition, so that the network knows the null map."""
        return self.dense is not None and self.dense.dropout > 0

    def at(self, step: int, epoch: int, ended: bool) -> "Header":
        """The header of a checkpoint at another position of the run."""
        return dataclasses.replace(self, step=step, epoch=epoch, ended=ended)


def _check_registered(kind: str, name: str, known: Mapping[str, Any]) -> None:
    """Refuse a name that no dictionary of this version, or of what was imported besides, has.

    Raises:
        UsageError: it lists the known ones.
    """
    if name not in known:
        raise UsageError(
            f"the {kind} {name!r} is none that this version knows ({', '.join(known)}); if a file of yours adds it, import "
            "that file first (docs/extending.md)"
        )


def _tuples(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
