"""Exported folders on Hugging Face's hub: sending one, and finding one by its name.

huggingface_hub reads the account's token itself, from HF_TOKEN or from `hf auth login`.
"""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from checkpoints.files import describes_network
from diffusers_export.exported import WEIGHTS
from diffusers_export.writer import INDEX, NETWORK, VAE
from models.autoencoders.hub import check_hub, is_unreachable, unreachable
from models.autoencoders.loading import is_hub_id
from options import UsageError

__all__ = ["check_login", "find_exported", "push"]

# Weights and configurations, but no code: this project reads the folder with its own.
WANTED = (INDEX, *(f"{part}/*.{suffix}" for part in (NETWORK, VAE) for suffix in ("json", "safetensors")))
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may do this"


def check_login(name: str) -> None:
    """Check, before the work, that the hub knows who is sending the folder.

    Raises:
        UsageError: the name is not owner/name, or the hub does not accept the account's token.
    """
    if not is_hub_id(name):
        raise UsageError(f"--push_to_hub {name}: expected a hub id of the form owner/name, such as me/my-flow")
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise UsageError(f"--push_to_hub {name}: the hub does not know this account: {LOGIN}") from error
    except Exception as error:  # the HTTP library depends on the version of huggingface_hub
        raise unreachable(name, error, "reach the hub for") from error


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Send a folder to the hub's repository `name`, which is created if necessary, and return its address.

    A repository that exists keeps its visibility. Files in it that the folder lacks stay.

    Raises:
        UsageError: the hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export").repo_url)
    except HfHubHTTPError as error:
        raise UsageError(
            f"--push_to_hub {name}: the hub refused ({_reason(error)}); the folder {folder} is complete: {LOGIN}, or send it "
            f"with `hf upload {name} {folder}`"
        ) from error


def find_exported(name: str | Path) -> tuple[Path, Path | None] | None:
    """The checkpoint and the autoencoder's folder (None: pixel space) in an exported folder; None for other names.

    Args:
        name: a folder that contains model_index.json, or the hub id of one, as text. Of a repository on the hub, no code is
            downloaded.

    Raises:
        UsageError: the folder was not exported by this project, or the hub cannot be reached or has no such repository.
    """
    folder = Path(name)
    if isinstance(name, str) and not folder.exists() and is_hub_id(name) and not name.endswith(FILE_SUFFIXES):
        folder = _download(name)
    elif not (folder / INDEX).is_file():
        return None
    weights, vae = folder / NETWORK / WEIGHTS, folder / VAE
    if not weights.is_file() or not describes_network(weights):
        raise UsageError(
            f"{name} is not a folder of `python -m checkpoints.export`: expected a checkpoint of this project in "
            f"{NETWORK}/{WEIGHTS}"
        )
    return weights, vae if vae.is_dir() else None


def _download(name: str) -> Path:
    check_hub(name, (INDEX,), "load the model")
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except HfHubHTTPError as error:
        raise UsageError(
            f"cannot load {name} from the hub ({_reason(error)}): check the name; for a private repository, {LOGIN}. If you "
            "mean a local file, it does not exist"
        ) from error
    except Exception as error:
        if is_unreachable(error):
            raise unreachable(name, error, "load the model") from error
        raise


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
