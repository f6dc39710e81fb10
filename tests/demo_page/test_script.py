import importlib.util

import pytest

from command_line import parse_options
from datasets_prep.datasets import DatasetOptions
from demo_page import script
from demo_page.script import DemoOptions, default_checkpoint, load_demo, run_demo
from options import UsageError
from runtime.precision import MachineOptions
from sampling.request import checkpoint_groups


def test_without_a_checkpoint_the_error_names_the_training_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"best\.safetensors does not exist: train it with `bash run.sh`"):
        default_checkpoint()
    path = tmp_path / "saved_info/latent_flow/fashion_mnist/fashion_mnist_dit/best.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    assert default_checkpoint().resolve() == path


def test_without_gradio_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e \"\.\[demo\]\""):
        run_demo("", ["model.safetensors"])


def test_the_page_is_served_to_this_machine_only_by_default():
    options = parse_options("", [DemoOptions], [])[DemoOptions]
    assert (options.host, options.port) == ("127.0.0.1", 7860)
    assert script._is_local(options.host)
    assert script._is_local("localhost")
    assert script._is_local("::1")
    assert not script._is_local("0.0.0.0")
    assert not script._is_local("example.org")


def test_flags_that_describe_a_file_are_passed_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(script, "load", lambda path, **values: seen.update(values))
    monkeypatch.setattr(script.DemoModel, "abilities", property(lambda model: model), raising=False)
    monkeypatch.setattr(script.DemoModel, "describe", lambda model: "", raising=False)
    groups = (DemoOptions, MachineOptions, DatasetOptions, *checkpoint_groups())
    words = "--dataset celeba_256 --image_size 256 --model_type DiT-L/2 --device cpu --max_steps 7".split()
    options = parse_options("", groups, words)
    model = load_demo(tmp_path / "m.pth", options[DemoOptions], options[MachineOptions], options.given)
    described = {"dataset": "celeba_256", "image_size": 256, "model_type": "DiT-L/2"}
    assert seen == {**described, "device": "cpu", "precision": "auto", "compile": False, "autoencoder": None}
    assert model.limits.steps == 7
