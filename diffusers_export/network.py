"""Loads the velocity network of this folder with the code in ../code.

diffusers copies this file into its cache of modules, and calls `from_pretrained` with the folder `network`. The code is
imported from where it lies, under a name that contains its hash. Two folders with different code can therefore be used in one
process, and no module of yours can be mistaken for one of these.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

CODE = "code"  # folder next to this file's
MODULE = "diffusers_export.exported"  # in that folder


class LatentFlowNetwork:
    """Stands for the network in model_index.json."""

    @classmethod
    def from_pretrained(cls, folder: str, **settings: Any) -> Any:
        """Load the network with float32 weights on the CPU; diffusers' settings for its own models have no effect."""
        name = import_package(Path(folder).parent / CODE)
        return importlib.import_module(f"{name}.{MODULE}").load_exported(folder)


def import_package(folder: Path) -> str:
    """Import the package in `folder`, and return the name that it gets in sys.modules."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    name = f"latent_flow_{digest.hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} is not a package")
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
    return name
