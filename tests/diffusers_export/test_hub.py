"""Exported folders on the hub: sent, read back, and downloaded by diffusers, over a faked HTTP layer."""

import json
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from huggingface_hub import constants
from huggingface_hub.utils import _http

import latent_flow
from diffusers_export.hub import push
from options import UsageError
from tests.diffusers_export.fake_hub import FakeHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = FakeHub(httpx2.Response)
    monkeypatch.setenv("HF_TOKEN", fake.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(fake), follow_redirects=True)
    )
    yield fake
    huggingface_hub.set_client_factory(_http.default_client_factory)


def test_a_folder_is_sent_and_read_back(places, hub):
    folder = places.exported / "latent"
    assert push(folder, "me/flow") == "https://huggingface.co/me/flow"
    assert [(each["name"], each["visibility"]) for each in hub.created] == [("flow", "private")]
    sent = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sent == set(hub.files)
    hub.asked.clear()
    flow = latent_flow.load("me/flow", device="cpu", precision="fp32")
    assert torch.equal(flow.sample(count=2), latent_flow.load(folder, device="cpu", precision="fp32").sample(count=2))
    assert not [line for line in hub.asked if line.endswith(".py")]  # no code of the repository


def test_public_must_be_asked_for(places, hub):
    push(places.exported / "pixels", "me/flow", public=True)
    assert hub.created[0]["visibility"] == "public"


def test_a_refusal_names_the_way_out(places, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UsageError, match="the hub refused .* is complete: log in with `hf auth login`"):
        push(places.exported / "pixels", "me/flow")


def test_a_missing_repository_is_named(hub):
    with pytest.raises(UsageError, match="cannot load me/missing from the hub .* check the name"):
        latent_flow.load("me/missing")


def test_a_missing_file_is_not_looked_up(hub):
    for name in (Path("me/flow"), "me/flow.safetensors"):
        with pytest.raises(UsageError, match="cannot read the checkpoint"):
            latent_flow.load(name)
    assert hub.asked == []


def test_the_command_exports_and_sends(places, hub, call, tmp_path):
    file = places.checkpoints / "pixels" / "best.safetensors"
    code, out, error = call(
        "checkpoints/export.py", [file, tmp_path / "out", "--num_steps", 3, "--push_to_hub", "me/flow"]
    )
    assert code in (0, None), error
    assert "https://huggingface.co/me/flow" in out
    assert 'latent_flow.load("me/flow")' in " ".join(out.split())
    defaults = json.loads(hub.files["model_index.json"])["defaults"]
    assert (defaults["method"], defaults["num_steps"]) == ("dpm", 3)
    assert b"best.safetensors out --num_steps 3" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub", "flow"], "expected a hub id of the form owner/name"),
        (["--push_to_hub", "me/flow"], "the hub does not know this account: log in"),
        (["--public"], "--public has no effect without --push_to_hub"),
    ],
)
def test_the_command_checks_the_hub_before_the_work(places, hub, call, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, error = call(
        "checkpoints/export.py", [places.checkpoints / "pixels" / "best.safetensors", tmp_path / "out", *flags]
    )
    assert code not in (0, None)
    assert message in " ".join(error.split())
    assert not (tmp_path / "out").exists()


def test_diffusers_downloads_all_that_it_needs(places, hub, monkeypatch, tmp_path):
    push(places.exported / "latent", "me/flow")

    def download(name, *, allow_patterns, ignore_patterns, **others):
        """The files that snapshot_download would have fetched."""
        folder = tmp_path / "snapshot"
        for file, content in hub.files.items():
            if any(fnmatch(file, each) for each in allow_patterns) and not any(
                fnmatch(file, each) for each in ignore_patterns
            ):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        return folder

    monkeypatch.setattr(pipeline_utils, "snapshot_download", download)
    pipe = DiffusionPipeline.from_pretrained("me/flow", trust_remote_code=True)
    local = DiffusionPipeline.from_pretrained(places.exported / "latent", trust_remote_code=True)
    assert torch.equal(pipe(output_type="latent").images, local(output_type="latent").images)
    assert (tmp_path / "snapshot" / "code" / "models" / "autoencoders" / "pretrained.py").is_file()
