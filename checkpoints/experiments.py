"""Where experiments keep their checkpoints: <save_root>/<kind of run>/<dataset>/<exp>/model_<epoch>.safetensors."""

import re
from pathlib import Path

from options import UsageError

__all__ = ["experiment_folder", "find_checkpoint", "newest_model"]


def experiment_folder(save_root: str, dataset: str, exp: str, kind: str = "latent_flow") -> Path:
    """The folder of an experiment; `kind` is the name that its task gives to all of its experiments.

    Raises:
        UsageError: a name that is not a plain folder name.
    """
    for flag, name in (("exp", exp), ("dataset", dataset)):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(f"--{flag} {name!r}: expected a plain name of letters, digits, '_', '-', '.' and '+'")
    return Path(save_root) / kind / dataset / exp


def find_checkpoint(name: str, folder: Path) -> Path:
    """The file of that name: as it stands, or else in an experiment's folder, as the published scripts looked for it."""
    inside = folder / name
    return inside if inside.exists() and not Path(name).exists() else Path(name)


def newest_model(folder: Path, epoch: int | None = None) -> Path:
    """The checkpoint of `epoch` in a run's folder, or the newest one; ours before a published one of the same epoch.

    Raises:
        UsageError: there is none; the message lists what the folder has.
    """
    found: dict[int, Path] = {}
    for suffix in (".pth", ".safetensors"):
        paths = sorted(folder.glob(f"model_*{suffix}"))
        found |= {int(match[1]): path for path in paths if (match := re.fullmatch(r"model_(\d+)", path.stem))}
    if not found or (epoch is not None and epoch not in found):
        wanted = f"model_{'<epoch>' if epoch is None else epoch}"
        present = f"it has: {', '.join(p.name for p in sorted(found.values())) or 'no checkpoints'}"
        raise UsageError(
            f"no {wanted}.safetensors or {wanted}.pth in {folder} ({present if folder.is_dir() else 'no such folder'}); "
            "train first with run.sh, or name a file with --checkpoint"
        )
    return found[max(found) if epoch is None else epoch]
