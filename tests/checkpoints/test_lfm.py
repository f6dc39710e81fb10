"""Reads LFM's checkpoint formats. The files are built from the golden cases' lists of names."""

import argparse
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints.files import load_model, read_weights, save_weights
from checkpoints.lfm import describe_unseen
from checkpoints.lfm_files import read_condition_stage, read_published, read_sampled
from checkpoints.projects.opening import open_published
from checkpoints.tasks import GENERATE, INPAINT, SEMANTIC
from command_line import parse_options
from datasets_prep.masks import MaskSetOptions
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.losses.options import FlowMatchingOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions
from models.conditions import Condition, DenseInput
from models.dit import DiTOptions
from models.guided_unet import GuidedUNet, GuidedUNetOptions
from models.registry import build_network
from options import UsageError
from sampling.loading import load_sampler
from sampling.request import sampler_request, sampling_groups
from tasks.conditioned_request import conditioned_groups
from tasks.inpainting import InpaintingOptions
from tasks.semantic_synthesis import SegmentationOptions
from tests.headers import header_of

ROOT = Path(__file__).parents[2]
CASES = {path.stem: path for path in sorted((ROOT / "tests" / "golden").glob("*.safetensors"))}
NETWORK_FLAGS = (
    "image_size f num_in_channels num_out_channels nf num_res_blocks attn_resolutions ch_mult label_dim num_classes "
    "label_dropout use_origin_adm use_scale_shift_norm resblock_updown use_new_attention_order resamp_with_conv num_heads "
    "num_head_upsample num_head_channels"
).split()
BUFFERS = ("resample_filter", "freqs")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A folder with an autoencoder like LFM's: factor 8, four channels."""
    folder = tmp_path_factory.mktemp("autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8, 8, 8), 4, 64, {}).save_pretrained(folder)
    return folder


def weights_of(case, golden):
    """The state dict described by the case's list. Its constant entries come from the network."""
    constants = golden.build_case(case).state_dict()
    return {
        name: constants[name].clone()
        if name in case.constant_weights
        else torch.from_numpy(golden._fill_weight(name, tuple(shape)))
        for name, shape in case.weights
    }


def model_type_of(arguments):
    return "DiT-Golden/2" if arguments["model_type"] == "DiT" else arguments["model_type"]


def flags_of(arguments, autoencoder):
    flags = ["--model_type", model_type_of(arguments), "--pretrained_autoencoder_ckpt", str(autoencoder)]
    for name in NETWORK_FLAGS:
        value = arguments[name]
        if value not in (None, []):
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*flags, "--dataset", "celeba_256"]


def content_of(case, weights, prefix="", **arguments):
    """LFM's content.pth with `weights` as EMA weights. Its raw weights are different."""
    parameters = [name for name, _ in case.weights if not name.endswith(BUFFERS)]
    states = {
        index: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full_like(weights[name], index),
            "exp_avg_sq": torch.full_like(weights[name], 2 * index),
            "ema": weights[name],
        }
        for index, name in enumerate(parameters)
        if name != "pos_embed"  # frozen
    }
    moved = {
        name: value + 1 if name in parameters and name != "pos_embed" else value for name, value in weights.items()
    }
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(range(len(parameters)))}]
    return {
        "epoch": 3,
        "global_step": 21,
        "args": argparse.Namespace(**arguments),
        "model_dict": {prefix + name: value for name, value in moved.items()},
        "optimizer": {"state": states, "param_groups": groups},
        "scheduler": {"last_epoch": 3, "_last_lr": [1e-4]},
    }


def request_of(flags):
    """The request made by test_flow_latent.py for these flags."""
    return sampler_request(parse_options("", sampling_groups(), flags))


def given_of(flags):
    """The values of flags by name."""
    return request_of(flags).given


@torch.no_grad()
def assert_golden(model, case, golden):
    tensors = case.tensors
    latents = model.header.latent_channels
    x, beside = tensors["in.x"][:, :latents], tensors["in.x"][:, latents:]
    condition = Condition(tensors.get("in.y"), beside if beside.shape[1] else None)
    velocity = model.network(tensors["in.t"], x, condition)
    assert (velocity - tensors["out.velocity"]).abs().max() <= golden.LIMITS["velocity"]
    if case.cfg_scale is not None:
        null = Condition(torch.full_like(tensors["in.y"], model.header.num_classes))
        velocity = GuidedVelocity(model.network, condition, null, GuidanceOptions(case.cfg_scale))
        guided = velocity(tensors["in.t_cfg"][0], tensors["in.x"])
        assert (guided - tensors["out.velocity_cfg"]).abs().max() <= golden.LIMITS["velocity_cfg"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_lfms_weights_give_the_golden_velocities(name, prefix, golden, autoencoder, tmp_path):
    case = golden.read_case(CASES[name])
    path = tmp_path / "model_475.pth"
    torch.save({prefix + key: value for key, value in weights_of(case, golden).items()}, path)
    model = open_published(path, given_of(flags_of(case.arguments, autoencoder)), "cpu")
    assert_golden(model, case, golden)
    header = model.header
    assert (header.epoch, header.latent_size, header.dataset.name) == (475, 8, "celeba_256")
    assert header.autoencoder.scale_factor == 0.18215
    torch.testing.assert_close(model.autoencoder.std.flatten(), torch.full((4,), 1 / 0.18215))
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize("name", CASES)
def test_content_pth_gives_its_ema_weights_and_arguments(name, golden, autoencoder, tmp_path, capsys):
    """Needs no network flags, because content.pth stores its run's arguments."""
    case = golden.read_case(CASES[name])
    arguments = case.arguments | {"model_type": model_type_of(case.arguments), "dataset": "celeba_256", "lr": 1e-4}
    path = tmp_path / "content.pth"
    torch.save(content_of(case, weights_of(case, golden), "module.", **arguments), path)
    model = open_published(path, given_of(["--pretrained_autoencoder_ckpt", str(autoencoder)]), "cpu")
    assert_golden(model, case, golden)
    assert (model.header.epoch, model.header.step) == (3, 21)
    count = sum(not key.endswith((*BUFFERS, "pos_embed")) for key, _ in case.weights)
    assert f"EMA values for {count} of its {len(case.weights)} weights" in capsys.readouterr().out


def test_content_pth_without_ema_gives_its_raw_weights(golden, autoencoder, tmp_path, capsys):
    case = golden.read_case(CASES["adm_unconditional"])
    weights = weights_of(case, golden)
    for optimizer in (content_of(case, weights)["optimizer"], {}):
        for state in optimizer.get("state", {}).values():
            state.pop("ema")
        torch.save(
            content_of(case, weights) | {"model_dict": weights, "optimizer": optimizer}, tmp_path / "content.pth"
        )
        model = open_published(tmp_path / "content.pth", given_of(flags_of(case.arguments, autoencoder)), "cpu")
        assert_golden(model, case, golden)
        assert "adm with its" in capsys.readouterr().out


def test_flags_take_precedence_over_arguments_in_content_pth(golden, autoencoder, tmp_path):
    case = golden.read_case(CASES["adm_unconditional"])
    path = tmp_path / "content.pth"
    torch.save(content_of(case, weights_of(case, golden), **case.arguments | {"dataset": "ffhq_256", "seed": 5}), path)
    flags = ["--pretrained_autoencoder_ckpt", str(autoencoder), "--dataset", "celeba_256", "--scale_factor", "0.5"]
    header = open_published(path, given_of(flags), "cpu").header
    assert (header.dataset.name, header.autoencoder.scale_factor) == ("celeba_256", 0.5)
    with pytest.raises(UsageError, match=r"content\.pth does not fit this adm; .*the file would fit with --nf 32$"):
        open_published(path, given_of([*flags, "--nf", "64"]), "cpu")


def test_edm_networks_with_labels_can_always_be_guided(golden, autoencoder, tmp_path):
    """Their null class is a zero vector, and LFM's files do not record whether labels were dropped."""
    case = golden.read_case(CASES["adm_class_conditional"])
    torch.save(weights_of(case, golden), tmp_path / "model_1.pth")
    flags = flags_of(case.arguments | {"label_dropout": None}, autoencoder)
    assert open_published(tmp_path / "model_1.pth", given_of(flags), "cpu").header.network.label_dropout > 0


def test_optimizer_state_for_other_parameters_is_refused(golden, tmp_path):
    case = golden.read_case(CASES["dit_unconditional"])
    content = content_of(case, weights_of(case, golden))
    content["optimizer"]["state"] = {i + 1: state for i, state in content["optimizer"]["state"].items()}
    torch.save(content, tmp_path / "content.pth")
    with pytest.raises(UsageError, match=r"content\.pth: the optimizer state does not match the \d+ parameters"):
        read_published(tmp_path / "content.pth")


def test_a_training_state_of_this_project_is_refused_without_asking_for_flags(tmp_path):
    weights = {"w": torch.zeros(2)}
    torch.save({"network": weights, "ema": {"weights": weights}}, tmp_path / "content.pth")
    with pytest.raises(UsageError, match="is a training state for resuming a run: pass a model_"):
        open_published(tmp_path / "content.pth", {}, "cpu")


def test_the_label_map_stage_next_to_a_model_is_found(tmp_path):
    weight = torch.randn(4, 19, 1, 1)
    (tmp_path / "model_175.pth").touch()
    assert read_condition_stage(tmp_path / "model_175.pth") == {}
    for prefix in ("", "module."):
        torch.save({f"{prefix}channel_mapper.weight": weight}, tmp_path / "cond_stage_model_175.pth")
        found = read_condition_stage(tmp_path / "model_175.pth")
        assert found.keys() == {"channel_mapper.weight"}
        assert torch.equal(found["channel_mapper.weight"], weight)
    assert read_published(tmp_path / "cond_stage_model_175.pth").epoch == 175


@pytest.mark.parametrize(
    "value", [3, [torch.zeros(1)], {"a": 1.0}, {}, {"a": torch.zeros(1), "module.a": torch.zeros(1)}]
)
def test_other_values_are_not_a_state_dict(value, tmp_path):
    torch.save(value, tmp_path / "model_1.pth")
    with pytest.raises(UsageError, match=r"model_1\.pth: (expected a state dict|some names appear both)"):
        read_published(tmp_path / "model_1.pth")


class Trap:
    """Creates a file if it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model_1.pth", "content.pth", "cond_stage_model_1.pth"])
def test_code_in_an_lfm_file_is_never_executed(name, zipped, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / name
    content = {"model_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(trap=Trap(marker))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UsageError, match=r"it contains \S+; only tensors and plain values are read, and code is never executed"
    ):
        open_published(path, given_of([]), "cpu")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the trap works


@pytest.fixture
def convert(monkeypatch, capsys):
    """`convert(arguments)` runs `python -m checkpoints.convert` in this process and returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "checkpoints" / "convert.py"), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("name", CASES)
def test_conversion_keeps_the_velocities(name, convert, golden, autoencoder, tmp_path):
    case = golden.read_case(CASES[name])
    weights = weights_of(case, golden)
    torch.save(weights, tmp_path / "model_475.pth")
    code, _, err = convert(
        tmp_path / "model_475.pth", tmp_path / "m.safetensors", *flags_of(case.arguments, autoencoder)
    )
    assert code == 0, err
    model = load_model(tmp_path / "m.safetensors")  # the file needs no further description
    assert_golden(model, case, golden)
    code, _, err = convert(tmp_path / "m.safetensors", tmp_path / "back.pth", "--module_prefix")
    assert code == 0, err
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == {f"module.{key}" for key in weights}
    assert all(torch.equal(back[f"module.{key}"], value) for key, value in weights.items())


def test_a_network_that_predicts_data_is_not_converted_to_lfms_format(convert, tmp_path):
    header = header_of(DiTOptions(2, 2), path=FlowMatchingOptions(prediction="data"))
    save_weights(tmp_path / "m.safetensors", {"weight": torch.zeros(1)}, header)
    code, _, err = convert(tmp_path / "m.safetensors", tmp_path / "m.pth")
    assert code == 2
    assert "predicts the data, but networks in LFM's files predict the velocity" in err
    assert not (tmp_path / "m.pth").exists()


def test_conversion_leaves_out_auxiliary_heads(convert, tmp_path):
    options = DiTOptions(num_classes=2, label_dropout=0.1)
    heads = replace(options, tap_block=2, auxiliary_velocity=0.5, align_latents=1.0)
    network = build_network("DiT-Mi/2", 8, heads)
    save_weights(tmp_path / "model.safetensors", network.state_dict(), replace(header_of(heads), latent_size=8))
    code, _, err = convert(tmp_path / "model.safetensors", tmp_path / "model_1.pth")
    assert code == 0
    assert "lacks the auxiliary heads" in err
    written = torch.load(tmp_path / "model_1.pth", weights_only=True)
    assert written.keys() == build_network("DiT-Mi/2", 8, options).state_dict().keys()


@pytest.mark.parametrize("changed", [{"time_scale_factor": 100.0}, {"norm": "rms"}, {"rope": True, "class_tokens": 2}])
def test_a_network_with_options_that_lfm_lacks_is_not_converted_to_its_format(changed, convert, tmp_path):
    """A factor of the time and a norm without scales would not show in the state dict."""
    header = header_of(DiTOptions(2, 2, **changed))
    save_weights(tmp_path / "m.safetensors", {"weight": torch.zeros(1)}, header)
    code, _, err = convert(tmp_path / "m.safetensors", tmp_path / "m.pth")
    assert code == 2
    assert f"with {' '.join(f'--{name}' for name in changed)}, which LFM's networks do not have" in " ".join(
        err.split()
    )
    assert not (tmp_path / "m.pth").exists()


def test_converting_with_an_arguments_file_needs_no_autoencoder(convert, golden, autoencoder, tmp_path):
    """Without network access, LFM's autoencoder is represented by its id and scale; its hash is unknown."""
    case = golden.read_case(CASES["guided_diffusion_inpainting_9ch"])
    torch.save(weights_of(case, golden), tmp_path / "model_500.pth")
    (tmp_path / "arguments.txt").write_text(
        "EPOCH_ID=500\nDATASET=celeba_256\nEXP=x\nMETHOD=dopri5\nSTEPS=0\nUSE_ORIGIN_ADM=True\nIMG_SIZE=64\nBASE_CH=32\n"
        'CH_MULT="1 2"\nATTN_RES=2\nNUM_RES_BLOCKS=1\nNUM_IN_CHANNELS=9\n'
    )
    flags = ["--args_file", tmp_path / "arguments.txt"]
    code, _, err = convert(tmp_path / "model_500.pth", tmp_path / "m.safetensors", *flags)
    assert code == 0, err
    assert "stabilityai/sd-vae-ft-mse is not downloaded" in err
    header = read_weights(tmp_path / "m.safetensors")[1]
    assert (header.autoencoder.sha256, header.autoencoder.scale_factor) == (None, 0.18215)
    assert (header.network.num_in_channels, header.latent_channels, header.dataset.name) == (9, 4, "celeba_256")
    model = load_model(tmp_path / "m.safetensors", autoencoder=AutoencoderOptions(str(autoencoder)))
    assert_golden(model, case, golden)
    assert model.autoencoder.describe().latents_std == pytest.approx(header.autoencoder.latents_std)


def test_mistakes_in_converting(convert, golden, autoencoder, tmp_path):
    case = golden.read_case(CASES["adm_unconditional"])
    source, target = tmp_path / "model_1.pth", tmp_path / "m.safetensors"
    torch.save(weights_of(case, golden), source)
    flags = flags_of(case.arguments, autoencoder)
    for arguments, message in [
        ((source,), "expected IN OUT [flags]"),
        ((source, tmp_path / "other.pth", *flags), "expected a name ending in .safetensors"),
        ((tmp_path / "absent", target, *flags), "expected a name ending in .pth"),
        ((tmp_path / "absent", tmp_path / "b.pth"), "cannot read the checkpoint"),
        ((source, target, *flags, "--ch_mult", "1", "4"), "the file would fit with --ch_mult 1 2"),
        ((source, target, *flags, "--image_size", "65"), "--image_size 65 is not a multiple of 8"),
    ]:
        code, _, err = convert(*arguments)
        assert code == 2
        assert message in err
        assert sum(not line.startswith("note: ") for line in err.splitlines()) == 1
    assert not target.exists()
    code, out, _ = convert("--help_all")
    assert code == 0
    assert "--module_prefix" in out


def test_the_test_script_finds_and_samples_an_lfm_file(golden, autoencoder, tmp_path, monkeypatch, capsys):
    case = golden.read_case(CASES["dit_class_conditional"])
    folder = tmp_path / "saved_info" / "latent_flow" / "celeba_256" / "published"
    folder.mkdir(parents=True)
    for epoch in (450, 475):
        torch.save(weights_of(case, golden), folder / f"model_{epoch}.pth")
    run = ["--save_root", tmp_path / "saved_info", "--exp", "published", "--epoch_id", 475, "--precision", "fp32"]
    drawn = ["--method", "euler", "--num_steps", 2, "--n_sample", 2, "--cfg_scale", 1.5]
    monkeypatch.setattr(sys, "argv", ["x", *flags_of(case.arguments, autoencoder), *map(str, [*run, *drawn])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "test_flow_latent.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().err
    (record,) = (folder / "samples").glob("model_475_*.json")
    result = json.loads(record.read_text())
    assert (result["checkpoint"], result["samples"], result["step"]) == (str(folder / "model_475.pth"), 2, None)


# The networks described by the flags of the two downstream scripts, where --use_origin_adm is the default.
DOWNSTREAM = [
    "--dataset",
    "celeba_256",
    "--image_size",
    "64",
    "--nf",
    "32",
    "--num_res_blocks",
    "1",
    "--ch_mult",
    "1",
    "2",
]
DOWNSTREAM += ["--attn_resolution", "2", "--num_out_channels", "4"]
CLASSES = 19


def plain_network(channels, golden):
    """guided-diffusion's U-Net with `channels` input channels, filled like the golden cases."""
    options = GuidedUNetOptions(channels, 4, nf=32, num_res_blocks=1, ch_mult=(1, 2), attn_resolutions=(2,))
    network = GuidedUNet(8, options).eval()
    for name, value in network.state_dict().items():
        value.copy_(torch.from_numpy(golden._fill_weight(name, tuple(value.shape))))
    return network


@pytest.fixture
def open_with(autoencoder):
    """`open_with(task, path, flags)` opens a file the way the task's test script does."""

    def open_(task, path, *flags):
        own = {INPAINT: (MaskSetOptions, InpaintingOptions), SEMANTIC: (SegmentationOptions,)}[task]
        flags = [
            "--pretrained_autoencoder_ckpt",
            autoencoder,
            *DOWNSTREAM,
            "--checkpoint",
            path,
            "--precision",
            "fp32",
            *flags,
        ]
        options = parse_options("", (*conditioned_groups(), *own), [str(flag) for flag in flags])
        return load_sampler(sampler_request(options), tasks=(task, GENERATE) if task is INPAINT else (task,))

    return open_


@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_lfms_inpainting_network_gives_the_golden_velocity(prefix, golden, open_with, tmp_path):
    case = golden.read_case(CASES["guided_diffusion_inpainting_9ch"])
    torch.save({prefix + key: value for key, value in weights_of(case, golden).items()}, tmp_path / "model_500.pth")
    opened = open_with(INPAINT, tmp_path / "model_500.pth", "--num_in_channels", 9)
    assert opened.task is INPAINT
    assert opened.header.dense == DenseInput(5)
    t, x = case.tensors["in.t"], case.tensors["in.x"]
    velocity = opened.sampler.velocity(torch.zeros(len(x), dtype=torch.long), x[:, 4:])(t, x[:, :4])
    assert (velocity - case.tensors["out.velocity"]).abs().max() <= golden.LIMITS["velocity"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("flags", [["--num_in_channels", "8"], []], ids=["channels", "no channels"])
@torch.no_grad()
def test_lfms_semantic_network_maps_labels_with_its_separate_stage(prefix, flags, golden, open_with, tmp_path):
    plain = plain_network(8, golden)
    generator = torch.Generator().manual_seed(0)
    stage = torch.randn(4, CLASSES, 1, 1, generator=generator)
    torch.save({prefix + name: value for name, value in plain.state_dict().items()}, tmp_path / "model_175.pth")
    torch.save({f"{prefix}channel_mapper.weight": stage}, tmp_path / "cond_stage_model_175.pth")
    opened = open_with(SEMANTIC, tmp_path / "model_175.pth", *flags)
    assert opened.task is SEMANTIC
    assert opened.header.dense == DenseInput(4, CLASSES)
    t, x = torch.rand(2, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    shares = torch.rand(2, CLASSES, 8, 8, generator=generator)
    velocity = opened.sampler.velocity(torch.zeros(2, dtype=torch.long), shares)(t, x)
    mapped = torch.einsum("ck,bkhw->bchw", stage[:, :, 0, 0], shares)
    expected = plain(t, torch.cat([x, mapped], dim=1))
    assert (velocity - expected).abs().max() <= golden.LIMITS["velocity"]


def test_a_semantic_network_without_its_stage_is_refused(golden, open_with, tmp_path):
    torch.save(plain_network(8, golden).state_dict(), tmp_path / "model_175.pth")
    for task in (SEMANTIC, INPAINT):
        with pytest.raises(
            UsageError, match=r"semantic synthesis, which needs cond_stage_model_175\.pth in the same folder"
        ):
            open_with(task, tmp_path / "model_175.pth", "--num_in_channels", 8)


@pytest.mark.parametrize("name", ["guided_diffusion_inpainting_9ch", "dit_unconditional"])
def test_lfms_content_pth_describes_its_network(name, golden, autoencoder, tmp_path):
    """The file's arguments override the downstream scripts' default network. A generation network can inpaint untrained."""
    case = golden.read_case(CASES[name])
    arguments = case.arguments | {"model_type": model_type_of(case.arguments), "dataset": "celeba_256"}
    if name == "guided_diffusion_inpainting_9ch":
        arguments.pop("use_origin_adm")
    torch.save(content_of(case, weights_of(case, golden), **arguments), tmp_path / "content.pth")
    flags = ["--pretrained_autoencoder_ckpt", str(autoencoder), "--checkpoint", str(tmp_path / "content.pth")]
    options = parse_options("", (*conditioned_groups(), MaskSetOptions, InpaintingOptions), flags)
    opened = load_sampler(sampler_request(options), tasks=(INPAINT, GENERATE))
    assert opened.task is (GENERATE if name == "dit_unconditional" else INPAINT)
    assert opened.header.model_type == ("DiT-Golden/2" if name == "dit_unconditional" else "origin_adm")


def test_each_script_refuses_lfms_networks_for_other_tasks(golden, autoencoder, open_with, tmp_path):
    case = golden.read_case(CASES["guided_diffusion_inpainting_9ch"])
    torch.save(weights_of(case, golden), tmp_path / "model_1.pth")
    with pytest.raises(UsageError, match=r"trained for inpainting: use test_flow_latent_inpainting\.py"):
        open_with(SEMANTIC, tmp_path / "model_1.pth", "--num_in_channels", 9)
    flags = [*flags_of(case.arguments, autoencoder), "--checkpoint", str(tmp_path / "model_1.pth")]
    with pytest.raises(UsageError, match=r"trained for inpainting: use test_flow_latent_inpainting\.py"):
        load_sampler(request_of(flags))


@pytest.mark.parametrize("named", [True, False])
def test_converting_a_semantic_network_and_its_stage(named, convert, golden, autoencoder, tmp_path):
    weights, stage = plain_network(8, golden).state_dict(), torch.randn(4, CLASSES, 1, 1)
    torch.save(weights, tmp_path / "model_175.pth")
    torch.save({"module.channel_mapper.weight": stage}, tmp_path / "cond_stage_model_175.pth")
    flags = [*DOWNSTREAM, "--use_origin_adm", "--pretrained_autoencoder_ckpt", autoencoder]
    flags += ["--num_in_channels", 8] if named else []
    code, _, err = convert(tmp_path / "model_175.pth", tmp_path / "m.safetensors", *flags)
    assert code == 0, err
    whole, header = read_weights(tmp_path / "m.safetensors")
    assert header.dense == DenseInput(4, CLASSES)
    assert header.task == "semantic"
    assert set(whole) == {*weights, "channel_mapper.weight"}
    assert load_model(tmp_path / "m.safetensors").network.state_dict().keys() == whole.keys()
    code, _, err = convert(tmp_path / "m.safetensors", tmp_path / "back" / "model_9.pth", "--module_prefix")
    assert code == 0, err
    for name, expected in (("model_9.pth", weights), ("cond_stage_model_9.pth", {"channel_mapper.weight": stage})):
        back = torch.load(tmp_path / "back" / name, weights_only=True)
        assert set(back) == {f"module.{key}" for key in expected}
        assert all(torch.equal(back[f"module.{key}"], value) for key, value in expected.items())


def test_training_starts_from_lfms_network_and_its_stage(golden, tmp_path):
    weights, stage = plain_network(8, golden).state_dict(), torch.randn(4, CLASSES, 1, 1)
    torch.save(weights, tmp_path / "model_175.pth")
    assert read_sampled(tmp_path / "model_175.pth").keys() == weights.keys()
    torch.save({"channel_mapper.weight": stage}, tmp_path / "cond_stage_model_175.pth")
    sampled = read_sampled(tmp_path / "model_175.pth")
    assert torch.equal(sampled["channel_mapper.weight"], stage)
    assert all(torch.equal(sampled[name], value) for name, value in weights.items())


def test_an_autoencoder_that_is_not_loaded_has_the_scale_of_the_flags(tmp_path):
    torch.save({"mean": torch.ones(4), "std": torch.full((4,), 2.0)}, tmp_path / "stats.pt")
    facts = describe_unseen(AutoencoderOptions("owner/name", 0.5))
    assert (facts.latents_mean, facts.latents_std, facts.statistics) == ((0.0,) * 4, (2.0,) * 4, "")
    facts = describe_unseen(AutoencoderOptions("owner/name", 0.5, str(tmp_path / "stats.pt")))
    assert (facts.latents_mean, facts.latents_std, facts.statistics) == ((1.0,) * 4, (4.0,) * 4, "stats.pt")
