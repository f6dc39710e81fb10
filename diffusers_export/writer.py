"""Writes a checkpoint as a folder that diffusers loads: network, autoencoder, code, settings, license and model card.

model_index.json    components, and the default settings of solver and guidance
pipeline.py         the pipeline's class
network/            weights in this project's format, their header as config.json, and network.py, which loads them
code/               the modules of this project that sampling needs
vae/                the autoencoder in diffusers format; absent for networks of pixels
README.md, LICENSE  the model card, and the license of the code
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.files import LoadedModel, describes_network, load_model, read_weights, save_weights
from checkpoints.header import Header
from checkpoints.projects.opening import open_published
from diffusers_export.card import CardFacts, write_card
from diffusers_export.exported import WEIGHTS, load_exported
from diffusers_export.package import ROOT, code_files
from flow.guidance import GuidanceOptions
from flow.objectives import OBJECTIVES
from flow.solvers import SolverOptions, check_method
from models.autoencoders.loading import AUTOENCODERS, AutoencoderOptions, is_hub_id, save_autoencoder
from models.autoencoders.protocol import UNMEASURED
from options import UsageError, as_json
from runtime.provenance import provenance
from sampling.checks import check_guidance, check_network

__all__ = ["CODE", "INDEX", "NETWORK", "VAE", "Exported", "check_target", "export"]

INDEX, NETWORK, VAE, CODE = "model_index.json", "network", "vae", "code"
PIPELINE, PIPELINE_CLASS, NETWORK_CLASS = "pipeline", "LatentFlowPipeline", "LatentFlowNetwork"
OWN = Path(__file__).parent


class Exported(NamedTuple):
    """A folder that was written, and the header of its checkpoint."""

    folder: Path
    header: Header


def check_target(folder: Path) -> None:
    """Check that `folder` can be written.

    Raises:
        UsageError: it exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} already exists: expected a new or an empty folder; remove it or name another one")


def export(
    checkpoint: Path,
    folder: Path,
    solver: SolverOptions,
    guidance: GuidanceOptions,
    *,
    given: Mapping[str, Any],
    license_name: str = "",
    command: str = "",
) -> Exported:
    """Write the folder. It appears when it is complete.

    Args:
        checkpoint: a checkpoint of this project, or of another one that `given` describes.
        folder: a new or an empty folder.
        solver: default solver of the pipeline.
        guidance: default guidance of the pipeline.
        given: values of flags by name, for another project's checkpoint or an autoencoder that has moved.
        license_name: the license of the weights, as on the hub, such as "mit"; "" if the user did not name one.
        command: the command, for the model card.

    Raises:
        UsageError: the checkpoint is unreadable, needs dense conditions or an extension's code, lacks what solver or guidance
            need, or the folder is not empty.
    """
    check_target(folder)
    check_method(solver)
    model, weights = _open(checkpoint, given)
    header = _without_local_path(_with_known_autoencoder(model))
    _check(model, checkpoint, solver, guidance)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        part = Path(scratch) / "folder"
        save_weights(part / NETWORK / WEIGHTS, weights, header)
        vae_class = save_autoencoder(model.autoencoder, part / VAE)
        _write_json(part / NETWORK / "config.json", {"_class_name": NETWORK_CLASS, **header.to_json()})
        _write_json(part / INDEX, _index(vae_class, solver, guidance))
        _write_code(part)
        facts = CardFacts(folder.name, checkpoint, header, solver, guidance, license_name, command, provenance()["git"])
        (part / "README.md").write_text(write_card(facts), encoding="utf-8")
        load_exported(part / NETWORK)  # reads everything back, and compares the checksum
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    return Exported(folder, header)


def _open(checkpoint: Path, given: Mapping[str, Any]) -> tuple[LoadedModel, Mapping[str, torch.Tensor]]:
    """The model, and all weights in its file, also those that serve only training."""
    if not describes_network(checkpoint):
        model = open_published(checkpoint, given, "cpu")
        return model, model.network.state_dict()
    name = given.get("pretrained_autoencoder_ckpt")
    model = load_model(checkpoint, "cpu", AutoencoderOptions(name) if name else None)
    return model, read_weights(checkpoint)[0]


def _without_local_path(header: Header) -> Header:
    """The header, in which a local autoencoder is named by its folder alone: the export may be published."""
    name = header.autoencoder.id
    if name in AUTOENCODERS or is_hub_id(name):
        return header
    return replace(header, autoencoder=replace(header.autoencoder, id=Path(name).name))


def _with_known_autoencoder(model: LoadedModel) -> Header:
    """The header, with hash and scale of the autoencoder if it lacks them, as after a conversion without the autoencoder."""
    stored = model.header.autoencoder
    if stored.sha256 is not None and stored.statistics != UNMEASURED:
        return model.header
    return replace(model.header, autoencoder=replace(model.autoencoder.describe(), id=stored.id))


def _check(model: LoadedModel, checkpoint: Path, solver: SolverOptions, guidance: GuidanceOptions) -> None:
    """Check that the folder can do what the checkpoint needs.

    Raises:
        UsageError: it cannot.
    """
    header, code = model.header, code_files()
    if header.dense is not None:
        raise UsageError(
            f"{checkpoint} was trained for {header.task}, and needs a mask or a label map for each sample, which the exported "
            "pipeline does not take: expected a checkpoint that generates from noise and labels"
        )
    for what, module in {
        "network": type(model.network).__module__,
        "objective": OBJECTIVES[header.objective].build.__module__,
    }.items():
        if f"{module.replace('.', '/')}.py" not in code:
            raise UsageError(
                f"the {what} of {checkpoint} is defined in {module}, not in this project: expected one that is, because "
                "only this project's code is copied into the folder"
            )
    check_guidance(header.network.label_dropout, header.dense, guidance.cfg_scale)
    check_network(header.network, solver, guidance)


def _index(vae_class: str, solver: SolverOptions, guidance: GuidanceOptions) -> dict[str, Any]:
    # The null component makes diffusers download the whole folder `code` from the hub. Of a component with weights, it
    # downloads only the weights, the configuration and one file of code.
    return {
        "_class_name": [PIPELINE, PIPELINE_CLASS],
        "_diffusers_version": provenance()["versions"]["diffusers"],
        NETWORK: [NETWORK, NETWORK_CLASS],
        VAE: ["diffusers", vae_class] if vae_class else [None, None],
        CODE: [None, None],
        "defaults": {**as_json(solver), **as_json(guidance)},
    }


def _write_code(part: Path) -> None:
    for name, source in code_files().items():
        file = part / CODE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    shutil.copyfile(OWN / "pipeline.py", part / f"{PIPELINE}.py")
    shutil.copyfile(OWN / "network.py", part / NETWORK / f"{NETWORK}.py")
    for place in (part, part / CODE):
        shutil.copyfile(ROOT / "LICENSE", place / "LICENSE")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
