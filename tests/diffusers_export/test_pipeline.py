"""Exported folders in diffusers: samples equal the test script's, in a process that cannot import this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from checkpoints.files import read_weights
from command_line import parse_options
from diffusers_export.exported import WEIGHTS
from flow.solvers import solve
from sampling.loading import load_sampler
from sampling.request import sampler_request
from sampling.sampler import balanced_labels
from sampling.script import mode_groups
from tests.diffusers_export.conftest import CASES

ROOT = Path(__file__).parents[2]
COUNT = 5
SCRIPT = '''
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    """No module of the project is found, even if it is installed in this environment."""
    def find_spec(self, name, path=None, target=None):
        if path is None and name in %(names)r:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
sys.path[:] = [place for place in sys.path if place != %(root)r]
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
drawn = {}
for name in %(cases)r:
    pipe = DiffusionPipeline.from_pretrained(f"%(folder)s/{name}", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    drawn[name] = {
        kind: pipe(num_images=%(count)d, seed=7, batch_size=3, output_type=kind).images for kind in ("latent", "pt")
    }
torch.save(drawn, "drawn.pt")
print(*{name.partition(".")[0] for name in sys.modules if name.startswith("latent_flow")})
'''


@pytest.fixture(scope="module")
def drawn(places, tmp_path_factory):
    """Samples from each exported folder, drawn in one process without this project."""
    names = sorted({path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/")] if path.stem.isidentifier()})
    ours = [name for name in names if name not in ("data", "docs", "pytorch_fid", "examples")]
    values = {"names": ours, "root": str(ROOT), "cases": [*CASES], "folder": places.exported, "count": COUNT}
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "script.py").write_text(SCRIPT % values)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=place, env={**kept, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("latent_flow_")
    return torch.load(place / "drawn.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_samples_equal_the_test_scripts_before_rounding(places, drawn, name):
    words = [f"--checkpoint={places.checkpoints / name / 'best.safetensors'}", "--device=cpu", "--precision=fp32"]
    for flag, value in CASES[name].flags.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    sampler = load_sampler(sampler_request(parse_options("", mode_groups(), [*words, "--seed=7"]))).sampler
    indices = range(COUNT)
    velocity = sampler.velocity(balanced_labels(indices, sampler.num_classes))
    latents = solve(velocity, sampler.noise(indices), sampler.solver, draw=sampler.draw(indices)).x
    assert (drawn[name]["latent"] - latents).abs().max() < 1e-5
    pixels = sampler.autoencoder.decode(latents)
    if name == "latent":
        pixels = pixels[..., 2:14, 2:14]  # without the padding
    found = drawn[name]["pt"]
    assert found.shape == pixels.shape
    assert found.std() > 0.05
    assert (found - (pixels / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def pipe(places):
    loaded = DiffusionPipeline.from_pretrained(places.exported / "latent", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_pictures_are_the_rounded_images(pipe):
    pictures = pipe(labels=["dog", 0, 2], seed=3).images
    rounded = pipe(labels=[1, "cat", 2], seed=3, output_type="np").images
    assert [picture.size for picture in pictures] == [(12, 12)] * 3
    for picture, array in zip(pictures, rounded, strict=True):
        grays = torch.tensor(list(picture.tobytes())).view(12, 12, 1)
        assert torch.equal(grays, (torch.from_numpy(array) * 255).round().long())


def test_a_sample_depends_on_the_seed_and_its_index_alone(pipe):
    whole = pipe(labels=[0, 1, 1, 0], seed=5, output_type="latent").images
    part = pipe(labels=[1, 0], seed=5, first_index=2, batch_size=1, output_type="latent").images
    assert (part - whole[2:]).abs().max() < 1e-5
    assert (pipe(labels=[0], seed=6, output_type="latent").images - whole[:1]).abs().max() > 0.1


def test_settings_replace_the_defaults(pipe):
    def draw(**settings):
        return pipe(num_images=2, output_type="latent", **settings).images

    assert torch.equal(draw(num_steps=2, cfg_scale=1.0), draw(num_inference_steps=2, guidance_scale=1.0))
    for settings in (
        {"num_steps": 2},
        {"cfg_scale": 4.0},
        {"cfg_interval": (0.5, 1.0)},
        {"time_shift": 1.0},
        {"method": "euler"},
    ):
        assert (draw(**settings) - draw()).abs().max() > 1e-4, settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [3]}, r"expected class ids \[N\] in 0..2"),
        ({"labels": ["cow"]}, "names of cat, dog"),
        ({"labels": [0], "num_images": 2}, "as many labels as images"),
        ({"method": "flow_map"}, "predicts average velocities"),
        ({"steps": 3}, "unknown keyword steps"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
    ],
)
def test_a_bad_request_is_explained(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(**settings)


def test_the_network_can_run_in_bfloat16(pipe):
    exact, rounded = (pipe(labels=[0, 1], output_type="latent", precision=name).images for name in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.5
    assert torch.equal(pipe(labels=[0, 1], output_type="latent").images, exact)


def test_half_precision_weights_are_refused(places):
    pipe = DiffusionPipeline.from_pretrained(places.exported / "pixels", trust_remote_code=True).to(torch.bfloat16)
    with pytest.raises(ValueError, match="sampling needs float32"):
        pipe(num_images=1)


def test_code_is_not_run_without_permission(places):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(places.exported / "latent")


def test_damaged_weights_are_refused(latent_copy):
    file = latent_copy / "network" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        DiffusionPipeline.from_pretrained(latent_copy, trust_remote_code=True)


def test_other_code_gets_another_name(pipe, latent_copy):
    changed = latent_copy / "code" / "sampling" / "noise.py"
    changed.write_text(changed.read_text().replace('stream: str = "noise"', 'stream: str = "other"'))
    other = DiffusionPipeline.from_pretrained(latent_copy, trust_remote_code=True)
    assert (other(output_type="latent").images - pipe(output_type="latent").images).abs().max() > 0.1


def test_saving_from_diffusers_is_refused(pipe, tmp_path):
    with pytest.raises(RuntimeError, match="copy the folder"):
        pipe.save_pretrained(tmp_path)


def test_the_configuration_is_the_header(places):
    folder = places.exported / "latent" / "network"
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("_class_name") == "LatentFlowNetwork"
    assert config == read_weights(folder / WEIGHTS)[1].to_json()


def test_pixels_need_no_autoencoder(places):
    assert not (places.exported / "pixels" / "vae").exists()
