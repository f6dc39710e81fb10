"""Checkpoint paths: <save_root>/<task folder>/<dataset>/<exp>/model_<epoch>.safetensors."""

import re
from pathlib import Path

from options import UsageError

__all__ = ["experiment_folder", "find_checkpoint", "newest_model"]


def experiment_folder(save_root: str, dataset: str, exp: str, kind: str = "latent_flow") -> Path:
    """The run folder of an experiment.

    Args:
        save_root: root of all run folders.
        dataset: name of the dataset.
        exp: name of the experiment.
        kind: folder of the task (`Task.runs`).

    Raises:
        UsageError: a name is not a plain folder name.
    """
    for flag, name in (("exp", exp), ("dataset", dataset)):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(f"--{flag} {name!r}: expected a plain name of letters, digits, '_', '-', '.' and '+'")
    return Path(save_root) / kind / dataset / exp


def find_checkpoint(name: str, folder: Path) -> Path:
    """Resolve `name`: a path, or a file in the run folder if only that exists, as in LFM's scripts."""
    inside = folder / name
    return inside if inside.exists() and not Path(name).exists() else Path(name)


def newest_model(folder: Path, epoch: int | None = None) -> Path:
    """The checkpoint of `epoch` in a run folder, or the newest one; .safetensors takes precedence over .pth.

    Raises:
        UsageError: the checkpoint does not exist; the message lists the checkpoints in the folder.
    """
    found: dict[int, Path] = {}
    for suffix in (".pth", ".safetensors"):
        paths = sorted(folder.glob(f"model_*{suffix}"))
        found |= {int(match[1]): path for path in paths if (match := re.fullmatch(r"model_(\d+)", path.stem))}
    if not found or (epoch is not None and epoch not in found):
        wanted = f"model_{'<epoch>' if epoch is None else epoch}"
        names = [path.name for path in (*sorted(found.values()), folder / "best.safetensors") if path.is_file()]
        present = f"found: {', '.join(names) or 'no checkpoints'}"
        raise UsageError(
            f"no {wanted}.safetensors or {wanted}.pth in {folder} ({present if folder.is_dir() else 'no such folder'}); "
            "train first with run.sh, or pass a file with --checkpoint"
        )
    return found[max(found) if epoch is None else epoch]
