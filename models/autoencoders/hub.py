"""Whether Hugging Face's hub can be reached, asked before diffusers or timm ask.

Without a connection, huggingface_hub repeats its requests for half a minute (for several minutes if a firewall drops them), and
diffusers then reports a missing config.json. No setting of theirs limits the number of requests.
"""

import time
from collections.abc import Iterator, Sequence

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from options import UsageError

__all__ = ["UnreachableHubError", "check_hub", "is_unreachable", "unreachable"]

CONFIGS = ("config.json", "vae/config.json")  # an autoencoder's own, and the one of a pipeline's autoencoder
AUTOENCODER = "load the autoencoder"  # what cannot be done without the hub
PAUSES_S = (1, 2)  # before the second and the third request
LONG_WAIT_S = 5  # after which a failed request is not repeated


class UnreachableHubError(UsageError):
    """The hub cannot be reached, and its local cache lacks the files."""


def check_hub(name: str, files: Sequence[str] = CONFIGS, task: str = AUTOENCODER) -> None:
    """Check that the hub answers, unless its cache holds one of the `files` of the model `name`.

    A refusal, such as for a wrong name, counts as an answer.

    Raises:
        UnreachableHubError: the hub is offline or does not answer up to three requests.
    """
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    started = time.monotonic()
    for pause in (*PAUSES_S, None):
        try:
            get_hf_file_metadata(hf_hub_url(name, files[0]), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError:
            return
        except Exception as error:  # the HTTP library depends on the version of huggingface_hub
            waited = time.monotonic() - started > LONG_WAIT_S
            if pause is None or waited or isinstance(error, OfflineModeIsEnabled):
                raise unreachable(name, error, task) from error
            time.sleep(pause)
        else:
            return


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of diffusers was caused by an unreachable hub."""
    return any(isinstance(each, LocalEntryNotFoundError | OfflineModeIsEnabled) for each in _causes(error))


def unreachable(name: str, error: BaseException, task: str = AUTOENCODER) -> UnreachableHubError:
    """The error for the model `name`, which is neither in the cache nor can be downloaded. It cannot do the `task`."""
    cache, folder = constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}"
    where = f"its files are not in the hub's cache {cache}"
    advice = f"Pass a local folder in diffusers format, or copy {folder} from another machine's cache into this one (HF_HOME)"
    if constants.HF_HUB_OFFLINE:
        return UnreachableHubError(
            f"cannot {task} {name}: HF_HUB_OFFLINE is set, and {where}. Unset it to download them. {advice}"
        )
    *_, root = _causes(error)
    reason = next(iter(str(root).strip().splitlines()), type(root).__name__)
    return UnreachableHubError(
        f"cannot {task} {name}: {constants.ENDPOINT} cannot be reached ({reason}), and {where}. {advice}; "
        "then HF_HUB_OFFLINE=1 avoids further requests. HF_ENDPOINT names a mirror"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
