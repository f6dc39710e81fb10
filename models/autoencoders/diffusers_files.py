"""diffusers' autoencoders: their classes, their files, and their loading from a folder or from the hub."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging

from models.autoencoders.hub import check_hub, is_unreachable, unreachable
from models.autoencoders.kinds import KINDS
from models.autoencoders.weight_files import explain_damage, find_weight_files, has_standard_name, load_unwrapped
from options import UsageError
from runtime.messages import note
from runtime.weights import Mismatch, check_finite

__all__ = ["CONFIG", "PIPELINE_PART", "load_network", "new_network", "refuse_mismatch", "save_network"]

CONFIG = "config.json"
PIPELINE_PART = "vae"  # the autoencoder's folder in a pipeline's
DEFAULT_CLASS = "AutoencoderKL"  # of a config.json without a known class


def new_network(class_name: str, config: Mapping[str, Any]) -> Any:
    """Build an untrained autoencoder of a class in KINDS with a configuration.

    Raises:
        UsageError: the installed diffusers lacks the class, or the class needs another package.
    """
    return _find_class(class_name)(**config)


def load_network(folder: Path | None, name: str) -> Any:
    """Load an autoencoder from a local `folder` in diffusers format or, if that is None, from the hub by `name`.

    Its class is the one in its config.json. On the hub, the weights must be in safetensors format, and the autoencoder may be
    the `vae` of a pipeline. In a local folder, the weights may also have another file name, be in torch.save format, and have
    names with the prefixes of wrappers.

    Raises:
        UsageError: the hub cannot be reached, diffusers cannot load the autoencoder, it has a class that is not in KINDS, or
            its weights are incomplete, do not fit or are not finite.
    """
    local = folder is not None
    if not local:
        check_hub(name)
    try:
        config, place = _read_config(folder, name)
        class_name = _choose_class(str(config.get("_class_name", DEFAULT_CLASS)), name)
        network, mismatch = _load_weights(_find_class(class_name), config, place, folder, name)
    except UsageError:
        raise
    except Exception as error:  # diffusers raises many types of error when loading fails
        if not local and is_unreachable(error):
            raise unreachable(name, error) from error
        if folder is not None and not (folder / CONFIG).exists():
            reason = "it has no config.json, so it is not a folder in diffusers format"
        else:
            reason = (explain_damage(folder) if folder is not None else "") or _reason(error)
        raise UsageError(f"cannot load the autoencoder {name}: {reason}{_advise(folder)}") from error
    refuse_mismatch(mismatch, name, f"the {class_name} in its config.json")
    check_finite(network.state_dict(), f"the autoencoder {name}")
    return network


def save_network(network: Any, folder: Path) -> None:
    """Write an autoencoder in diffusers format: safetensors weights, and a config.json without paths of this machine."""
    copied = type(network).from_config(dict(network.config))
    copied.load_state_dict(network.state_dict())  # in torch's standard memory format, as safetensors requires
    copied.save_pretrained(folder, safe_serialization=True)
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def refuse_mismatch(mismatch: Mismatch, name: str, what: str) -> None:
    """Raise UsageError if the weights of the autoencoder `name` do not fit `what`."""
    if any(mismatch):
        raise UsageError(f"the weights of the autoencoder {name} do not fit {what}; {mismatch}{_explain(mismatch)}")


def _read_config(folder: Path | None, name: str) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The configuration, and the subfolder of a pipeline on the hub that holds the autoencoder, as an argument."""
    read = partial(diffusers.AutoencoderKL.load_config, folder or name, local_files_only=folder is not None)
    with _quiet(folder is not None):
        try:
            return read(), {}
        except Exception as error:
            if folder is not None or is_unreachable(error):
                raise
            with contextlib.suppress(Exception):
                return read(subfolder=PIPELINE_PART), {"subfolder": PIPELINE_PART}
            raise


def _load_weights(
    network_class: Any, config: Mapping[str, Any], place: Mapping[str, str], folder: Path | None, name: str
) -> tuple[Any, Mismatch]:
    """Load the weights with diffusers, or by name if it finds no file or they do not fit; returns what does not fit."""
    files = find_weight_files(folder) if folder is not None else []
    if folder is not None and files and not has_standard_name(folder):
        network = network_class.from_config(config)
        try:
            mismatch = load_unwrapped(network, folder, files)
        except UsageError as error:
            raise UsageError(f"cannot load the autoencoder {name}: {error}") from error
        note(f"the weights of the autoencoder {name} are read from {files[0].name}")
        return network, mismatch
    local = folder is not None
    with _quiet(local):
        network, found = network_class.from_pretrained(
            folder or name,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # the caller lists them
            output_loading_info=True,
            **place,
        )
    mismatch = _mismatch(found)
    if any(mismatch) and folder is not None:
        mismatch = min(mismatch, load_unwrapped(network, folder, files), key=lambda each: sum(map(len, each)))
    return network.float(), mismatch  # because diffusers keeps the files' mixed precisions


def _choose_class(found: str, name: str) -> str:
    """Refuse diffusers' other classes. A class that diffusers does not know may have the layers of the default class."""
    if found in KINDS:
        return found
    if hasattr(diffusers, found):
        raise UsageError(
            f"cannot load the autoencoder {name}: its config.json names {found}, but expected one of {', '.join(KINDS)}"
        )
    note(f"the config.json of {name} names {found}, which is unknown: its weights are loaded as an {DEFAULT_CLASS}'s")
    return DEFAULT_CLASS


def _find_class(class_name: str) -> Any:
    """The class of diffusers with a name in KINDS."""
    package = KINDS[class_name].needs
    if package and find_spec(package) is None:
        raise UsageError(f"{class_name} needs the package {package}, which is not installed: pip install {package}")
    if not hasattr(diffusers, class_name):
        raise UsageError(
            f"the installed diffusers {diffusers.__version__} has no {class_name}: pip install --upgrade diffusers"
        )
    return getattr(diffusers, class_name)


def _mismatch(found: Mapping[str, Any]) -> Mismatch:
    """The mismatch that diffusers has found while loading."""
    shapes = [
        f"{name} ({'x'.join(map(str, stored))} in the file, {'x'.join(map(str, own))} in the network)"
        for name, stored, own in sorted(found["mismatched_keys"])
    ]
    return Mismatch(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), shapes)


@contextlib.contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Silence diffusers' warnings about weights, which become an error here, and progress bars of local files."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    """The first line of an error's message, with the next one if it announces it by a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _advise(folder: Path | None) -> str:
    """Where the files of an autoencoder are, for a folder that holds them in a subfolder."""
    if folder is not None and (folder / "model_index.json").exists() and (folder / PIPELINE_PART).is_dir():
        return f"; this is the folder of a whole pipeline: pass {folder / PIPELINE_PART}"
    if folder is not None and not (folder / CONFIG).exists() and (found := sorted(folder.glob("*/config.json"))):
        return f"; did you mean {found[0].parent}?"
    return ""


def _explain(mismatch: Mismatch) -> str:
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in mismatch.unexpected):
        return (
            "; the file has the names of the original latent diffusion code: pass the file itself instead of the folder"
        )
    if not any((mismatch.unexpected, mismatch.misshapen)) and all("quant_conv." in name for name in mismatch.missing):
        return "; if the autoencoder has no such layers, set use_quant_conv and use_post_quant_conv to false in config.json"
    return "; pass the complete folder of one autoencoder"
