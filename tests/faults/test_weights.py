"""Weights that do not fit, belong to another class or are not finite are refused by name; wrappers' prefixes are not a reason.

Public reports: Vchitect/Latte#66, huggingface/diffusers#4384, karpathy/nanoGPT#325, huggingface/diffusers#6815.
"""

import json
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.files import load_model, save_weights
from checkpoints.projects.opening import open_published
from datasets_prep.image_dataset import DatasetFacts
from evaluation.features.weights import read_weights_file
from models.autoencoders import diffusers_files
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from tests.headers import header_of
from training.network import load_fitting_weights

FILE = "diffusion_pytorch_model.safetensors"
NETWORK = DiTOptions(num_in_channels=3, num_out_channels=3)
FLAGS = {"dataset": "cifar10", "image_size": 16, "model_type": "DiT-Mi/4", "pretrained_autoencoder_ckpt": "none"}


def with_prefix(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder") / "original"
    torch.manual_seed(0)
    new_autoencoder_kl(3, (8, 16), 2, 16, {}).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(original, tmp_path):
    """`changed(change, ...)` saves a copy whose weights and configuration are changed, and returns its folder."""

    def save(change, **edits):
        folder = tmp_path / "changed"
        folder.mkdir()
        config = json.loads((original / "config.json").read_text()) | edits
        (folder / "config.json").write_text(json.dumps(config))
        weights = change(load_file(original / FILE))
        save_file(
            {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}, folder / FILE
        )
        return folder

    return save


def load(folder):
    return load_autoencoder(AutoencoderOptions(str(folder)), 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: with_prefix("module.", weights),
        lambda weights: with_prefix("first_stage_model.module._orig_mod.", weights),
        lambda weights: with_prefix("ema.", weights),
        lambda weights: with_prefix("model.vae.", weights),
        lambda weights: {name.replace("coder.", "coder._orig_mod."): value for name, value in weights.items()},
    ],
    ids=["data parallelism", "nested", "EMA only", "a prefix that is no wrapper's", "compiled halves"],
)
def test_an_autoencoder_behind_prefixes_is_the_same(change, changed, original):
    assert load(changed(change)).sha256 == load(original).sha256


def test_half_precision_behind_a_prefix_is_computed_in_single(changed):
    loaded = load(changed(lambda weights: with_prefix("module.", {n: v.half() for n, v in weights.items()})))
    assert {value.dtype for value in loaded.network.state_dict().values()} == {torch.float32}


def test_an_autoencoder_in_several_files_behind_a_prefix_is_the_same(original, tmp_path):
    network = diffusers.AutoencoderKL.from_pretrained(original)
    network.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert load(tmp_path / "sharded").sha256 == load(original).sha256
    for shard in shards:
        save_file(with_prefix("module.", load_file(shard)), shard)
    index = tmp_path / "sharded" / f"{FILE}.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": with_prefix("module.", content["weight_map"])}))
    assert load(tmp_path / "sharded").sha256 == load(original).sha256


def test_the_ema_weights_are_used_with_a_note(changed, original, capsys):
    folder = changed(lambda weights: {**with_prefix("ema.", weights), **{n: v + 1 for n, v in weights.items()}})
    assert load(folder).sha256 == load(original).sha256
    assert "the weights behind 'ema.' are used" in capsys.readouterr().err


def without(pattern):
    return lambda weights: {name: value for name, value in weights.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("^decoder"), "missing: decoder.conv_in.bias, .* and 48 more; pass the complete folder"),
        (without("mid_block"), "missing: decoder.mid_block.resnets.0.conv1.bias, .* and 22 more"),
        (without("quant_conv"), "missing: post_quant_conv.bias, .*quant_conv.weight; .* set use_quant_conv"),
        (lambda weights: {**weights, "bn.running_mean": torch.zeros(8)}, "unexpected: bn.running_mean"),
        (
            lambda weights: {**weights, "quant_conv.bias": torch.zeros(3)},
            r"wrong shape: quant_conv.bias \(3 in the file, 4 in the network\)",
        ),
        (lambda weights: with_prefix("module.", without("^decoder")(weights)), "missing: decoder.* and 48 more"),
        (lambda weights: {**weights, **with_prefix("module.", weights)}, "both with and without"),
        (
            lambda weights: {name.replace("down_blocks", "down"): value for name, value in weights.items()},
            "names of the original latent diffusion code",
        ),
        (
            lambda weights: {**weights, "quant_conv.bias": torch.tensor([0, torch.nan, torch.inf, 0])},
            r"not finite \(NaN or infinity\): quant_conv.bias \(2 of 4\)",
        ),
    ],
    ids=["decoder", "mid block", "quant", "extra", "shape", "prefixed half", "twice", "latent diffusion", "not finite"],
)
def test_an_autoencoder_that_does_not_fit_is_refused_with_names(change, named, changed, capfd):
    folder = changed(change)
    with pytest.raises(UsageError, match=named) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # diffusers warns in many lines


@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage21", "AutoencoderOobleck", "UNet2DModel"])
def test_a_class_that_is_not_for_images_is_refused(name, changed):
    with pytest.raises(UsageError, match=f"its config.json names {name}, but expected one of AutoencoderKL,"):
        load(changed(lambda weights: weights, _class_name=name))


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AutoencoderDC", "VQModel"])
def test_the_weights_of_another_class_are_refused(name, changed):
    with pytest.raises(UsageError, match=f"the weights of the autoencoder .* do not fit the {name} in its config.json"):
        load(changed(lambda weights: weights, _class_name=name))


def test_an_unknown_class_with_the_same_weights_is_loaded_with_a_note(changed, original, capsys):
    folder = changed(lambda weights: weights, _class_name="MyAutoencoder")
    assert load(folder).sha256 == load(original).sha256
    assert "names MyAutoencoder, which is unknown" in capsys.readouterr().err


def test_a_pipelines_folder_names_the_autoencoder_inside(original, tmp_path):
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="folder of a whole pipeline: pass .*pipeline/vae$"):
        load(tmp_path / "pipeline")


def test_a_file_instead_of_a_folder_is_refused(original):
    with pytest.raises(UsageError, match=r"safetensors: a file, but expected a folder in diffusers format"):
        load(original / FILE)


def test_a_hub_autoencoder_of_another_class_is_refused_before_its_weights_are_downloaded(monkeypatch):
    monkeypatch.setattr(diffusers_files, "check_hub", lambda name: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", lambda *a, **k: {"_class_name": "UNet2DModel"})
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", None)
    with pytest.raises(UsageError, match="names UNet2DModel, but expected one of AutoencoderKL,"):
        load_autoencoder(AutoencoderOptions("owner/name"), 3)


def network_weights():
    torch.manual_seed(0)
    weights = build_network("DiT-Mi/4", 16, NETWORK).state_dict()
    return {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "ema.", "ema.module.", "model."]
)
def test_a_network_behind_prefixes_is_the_same(prefix, tmp_path):
    weights = network_weights()
    torch.save(with_prefix(prefix, weights), tmp_path / "model_1.pth")
    opened = open_published(tmp_path / "model_1.pth", FLAGS, "cpu")
    for name, value in opened.network.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_network_in_a_container_is_the_same(tmp_path):
    """As nanoGPT and Lightning save them."""
    weights = network_weights()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}
    content = {"model": with_prefix("_orig_mod.", weights), "optimizer": optimizer, "step": 3}
    torch.save(content, tmp_path / "model_1.pth")
    opened = open_published(tmp_path / "model_1.pth", FLAGS, "cpu")
    for name, value in opened.network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    torch.save(content | {"ema": weights}, tmp_path / "model_1.pth")  # perhaps of a project with another convention
    with pytest.raises(UsageError, match=r"another project's training state, .* model, ema\. .* with --init_from"):
        open_published(tmp_path / "model_1.pth", FLAGS, "cpu")


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_network_with_raw_and_ema_weights_is_sampled_with_the_ema(prefix, tmp_path, capsys):
    weights = network_weights()
    raw = {name: value + 1 for name, value in weights.items()}
    torch.save(with_prefix(prefix, raw) | with_prefix("ema.", weights), tmp_path / "model_1.pth")
    opened = open_published(tmp_path / "model_1.pth", FLAGS, "cpu")
    for name, value in opened.network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert f"EMA values for {len(weights)} of its {len(weights)} weights" in capsys.readouterr().out


BIAS = "final_layer.linear.bias"


def test_network_weights_that_are_not_finite_are_refused_everywhere(tmp_path):
    weights = network_weights()
    weights[BIAS][:5] = torch.nan
    named = rf"not finite \(NaN or infinity\): {BIAS} \(5 of 48\)"
    torch.save(weights, tmp_path / "nan.pth")
    with pytest.raises(UsageError, match=rf"nan.pth has weights that are {named}"):
        open_published(tmp_path / "nan.pth", FLAGS, "cpu")
    facts = DatasetFacts("folder", 16, 3, None, True, ())
    save_weights(tmp_path / "nan.safetensors", weights, header_of(NETWORK, "DiT-Mi/4", 16, dataset=facts))
    with pytest.raises(UsageError, match=rf"nan.safetensors has weights that are {named}"):
        load_model(tmp_path / "nan.safetensors")
    with pytest.raises(UsageError, match=rf"--init_from: this checkpoint has weights that are {named}"):
        load_fitting_weights(build_network("DiT-Mi/4", 16, NETWORK), weights)
    with pytest.raises(UsageError, match=rf"nan.pth has weights that are {named}"):
        read_weights_file(str(tmp_path / "nan.pth"))


def test_init_from_reads_names_behind_prefixes(capsys):
    weights, network = network_weights(), build_network("DiT-Mi/4", 16, NETWORK)
    load_fitting_weights(network, with_prefix("model.module.", weights))
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert f"loaded {len(weights)} of {len(weights)} weights\n" in capsys.readouterr().out


def test_feature_weights_are_read_behind_prefixes(tmp_path):
    torch.save({"module.a": torch.ones(2), "module._orig_mod.b": torch.zeros(1)}, tmp_path / "features.pth")
    assert read_weights_file(str(tmp_path / "features.pth")).keys() == {"a", "b"}
