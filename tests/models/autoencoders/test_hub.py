import diffusers
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from models.autoencoders import diffusers_files, hub
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from options import UsageError

OWN = AutoencoderOptions("owner/name")


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """An empty cache and a hub that cannot be reached; the list of the requests' addresses."""
    asked = []

    def fail(url, **settings):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "PAUSES_S", (0, 0))
    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", lambda *_, **__: pytest.fail("asked diffusers"))
    return asked


def test_an_unreachable_hub_is_named_after_three_requests(requests, tmp_path):
    with pytest.raises(UsageError) as raised:
        load_autoencoder(OWN, 3)
    assert requests == ["https://huggingface.co/owner/name/resolve/main/config.json"] * 3
    assert str(raised.value) == (
        "cannot load the autoencoder owner/name: https://huggingface.co cannot be reached (Name or service not known), and "
        f"its files are not in the hub's cache {tmp_path}. Pass a local folder in diffusers format, or copy "
        "models--owner--name from another machine's cache into this one (HF_HOME); then HF_HUB_OFFLINE=1 avoids further "
        "requests. HF_ENDPOINT names a mirror"
    )


def test_a_request_that_takes_long_is_not_repeated(requests, monkeypatch):
    monkeypatch.setattr(hub, "LONG_WAIT_S", -1)
    with pytest.raises(UsageError, match="cannot be reached"):
        load_autoencoder(OWN, 3)
    assert len(requests) == 1


def test_offline_mode_is_named(requests, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set, and its files are not in the hub's cache"):
        load_autoencoder(OWN, 3)


def test_a_hub_that_refuses_is_reachable(requests, monkeypatch):
    class RefusalError(HfHubHTTPError):
        def __init__(self):
            pass

    def refuse(url, **settings):
        raise RefusalError

    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)
    hub.check_hub("owner/name")


def test_a_cached_configuration_needs_no_request(requests, monkeypatch):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    hub.check_hub("owner/name")
    assert requests == []


def test_cached_configuration_without_weights_and_hub(requests, monkeypatch):
    def absent(*arguments, **settings):
        try:
            try:
                raise ConnectionError("no route to host")
            except ConnectionError as error:
                raise LocalEntryNotFoundError("not in the cache") from error
        except LocalEntryNotFoundError:
            raise OSError("no file named config.json") from None

    monkeypatch.setattr(diffusers_files, "check_hub", lambda name: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", absent)
    with pytest.raises(UsageError, match=r"cannot be reached \(no route to host\)"):
        load_autoencoder(OWN, 3)
