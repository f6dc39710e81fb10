"""Provenance of files: the git commit and the library versions that produced them."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["code_version", "provenance"]

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "diffusers", "torchdiffeq", "timm", "numpy")


def code_version() -> str:
    """The git commit, followed by "-dirty" if files have changed; "unknown" outside a repository or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def provenance() -> dict[str, Any]:
    """Git commit and library versions, for config.json and checkpoints."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"git": code_version(), "versions": {"python": platform.python_version(), **versions}}
