"""Writing of exported folders: their files, model card and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import latent_flow
from checkpoints.files import read_weights, save_weights
from diffusers_export.exported import WEIGHTS
from diffusers_export.writer import export
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.conditions import DenseInput
from models.registry import NETWORKS
from options import UsageError
from tests.headers import header_of
from tests.small_networks import SMALL, new_network

ROOT = Path(__file__).parents[2]
PLAIN = SolverOptions("euler", 2), GuidanceOptions()


def without_path(header):
    """The header, whose autoencoder is named without its folder."""
    return replace(header, autoencoder=replace(header.autoencoder, id=Path(header.autoencoder.id).name))


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_folder_holds_only_text_safetensors_and_licenses(places):
    for folder in (places.exported / "latent", places.exported / "pixels"):
        files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.suffix for path in files} == {".py", ".json", ".md", ".safetensors", ""}
        for path in files:
            assert str(places.checkpoints.parent) not in path.read_bytes().decode("utf-8", "ignore"), path
            assert str(ROOT) not in path.read_bytes().decode("utf-8", "ignore").replace(path.name, ""), path
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_index_lists_components_and_defaults(places):
    index = json.loads((places.exported / "latent" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatentFlowPipeline"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    defaults = index["defaults"]
    found = {name: defaults[name] for name in ("method", "num_steps", "cfg_scale", "cfg_interval", "time_shift")}
    assert found == {"method": "dpm", "num_steps": 8, "cfg_scale": 2.5, "cfg_interval": [0.2, 0.7], "time_shift": 2.0}
    assert json.loads((places.exported / "pixels" / "model_index.json").read_text())["vae"] == [None, None]


def test_weights_come_back_bit_for_bit(places):
    for name in ("latent", "map", "adm"):
        source = places.checkpoints / name / "best.safetensors"
        (expected, header), (found, same) = (
            read_weights(source),
            read_weights(places.exported / name / "network" / WEIGHTS),
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert same == without_path(header)


def test_the_python_interface_reads_the_folder(places):
    settings = {"count": 3, "seed": 1, "steps": 2}
    ours = latent_flow.load(places.checkpoints / "latent" / "best.safetensors", device="cpu", precision="fp32")
    theirs = latent_flow.load(places.exported / "latent", device="cpu", precision="fp32")
    assert theirs.header == without_path(ours.header)
    assert torch.equal(theirs.sample(**settings), ours.sample(**settings))
    assert latent_flow.load(places.exported / "pixels", device="cpu").sample(count=1).shape == (1, 3, 8, 8)


def test_another_folder_of_diffusers_is_refused(latent_copy):
    (latent_copy / "network" / WEIGHTS).unlink()
    with pytest.raises(UsageError, match="is not a folder of `python -m checkpoints.export`"):
        latent_flow.load(latent_copy)


def test_the_card_states_recipe_scores_and_hashes(places, tmp_path):
    run = Path(shutil.copytree(places.checkpoints / "pixels", tmp_path / "run"))
    header = read_weights(run / "best.safetensors")[1]
    (run / "samples").mkdir()
    score = {
        "metric": "FID",
        "value": 12.345,
        "error": 0.5,
        "samples": 5000,
        "solver": {"method": "heun", "num_steps": 9},
    }
    for name, digest in (("own", header.weights_sha256), ("other", "0" * 64)):
        result = score | {"weights_sha256": digest, "value": 12.345 if name == "own" else 99.9}
        (run / "samples" / f"{name}.json").write_text(json.dumps(result))
    export(
        run / "best.safetensors", tmp_path / "out", *PLAIN, given={}, license_name="cc-by-4.0", command="the command"
    )
    card = card_of(tmp_path / "out")
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for text in (
        "license: cc-by-4.0", 'model_type "DiT-Mi/2"', "| FID | 12.35 ± 0.5 | 5,000 | ", "heun with 9 steps", "`the command`",
        str(header.weights_sha256), "`trust_remote_code=True` lets diffusers run", "## Limits",
    ):  # fmt: skip
        assert text in card, text
    assert "99.9" not in card  # another checkpoint's


def test_a_card_without_scores_says_so(places):
    card = card_of(places.exported / "unet")
    assert "No scores of these weights are recorded." in card
    assert "no null class, so `cfg_scale` must stay 1" in card


def test_a_folder_with_content_is_refused(places, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="expected a new or an empty folder"):
        export(places.checkpoints / "pixels" / "best.safetensors", tmp_path, *PLAIN, given={})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_dense_conditions_are_refused(tmp_path):
    options, dense = replace(SMALL["DiT-Mi/2"], num_in_channels=4), DenseInput(channels=1)
    header = header_of(options, latent_size=8, dense=dense, task="inpaint")
    save_weights(tmp_path / "model.safetensors", new_network("DiT-Mi/2", options, dense).state_dict(), header)
    with pytest.raises(UsageError, match="needs a mask or a label map for each sample"):
        export(tmp_path / "model.safetensors", tmp_path / "out", *PLAIN, given={})
    assert not (tmp_path / "out").exists()


def test_an_extensions_network_is_refused(places, tmp_path, monkeypatch):
    class Foreign(torch.nn.Linear):
        def __init__(self, size, options):
            super().__init__(1, 1)

    family = NETWORKS["unet"]._replace(build=Foreign)
    monkeypatch.setitem(NETWORKS, "foreign", family)
    header = header_of(SMALL["unet"], "foreign", 8)
    save_weights(tmp_path / "model.safetensors", Foreign(8, None).state_dict(), header)
    with pytest.raises(UsageError, match="the network of .* is defined in .*, not in this project"):
        export(tmp_path / "model.safetensors", tmp_path / "out", *PLAIN, given={})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixels", (SolverOptions("flow_map", 2), GuidanceOptions()), "predicts average velocities"),
        ("unet", (SolverOptions("euler", 2), GuidanceOptions(cfg_scale=2.0)), "needs a network with a null class"),
    ],
)
def test_impossible_defaults_are_refused(places, tmp_path, name, options, message):
    with pytest.raises(UsageError, match=message):
        export(places.checkpoints / name / "best.safetensors", tmp_path / "out", *options, given={})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(places, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_export.writer.write_card", lambda facts: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        export(places.checkpoints / "pixels" / "best.safetensors", tmp_path / "out", *PLAIN, given={})
    assert not list(tmp_path.iterdir())
