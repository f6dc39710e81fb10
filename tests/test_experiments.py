"""Parses the files in train_args/ and test_args/ with the scripts' parsers, and checks LFM's flags and their defaults."""

import re
import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from command_line import parse_options
from datasets_prep.datasets import DatasetOptions
from datasets_prep.masks import MaskOptions
from flow.guidance import GuidanceOptions
from flow.paths import PathOptions
from flow.solvers import SOLVERS, SolverOptions
from models.autoencoders.loading import AutoencoderOptions
from models.conditions import ConditionOptions
from models.registry import NETWORKS, NetworkOptions, build_network, complete_network
from runtime.pictures import GridOptions
from runtime.precision import MachineOptions
from runtime.processes.launch import LaunchOptions
from sampling.request import SamplingOptions, SourceOptions
from tasks.conditioned_request import ConditionedOptions
from training.experiment import ExperimentOptions
from training.run import TrainingOptions

ROOT = Path(__file__).parents[1]
KINDS = ("train", "test")
SCRIPTS = {"generate": "", "inpaint": "_inpainting", "semantic": "_semantic_syn"}  # endings of the scripts' names


class Experiment(NamedTuple):
    """One of LFM's published experiments: recipe, checkpoint, and parameters in millions."""

    exp: str
    dataset: str
    gpus: int
    batch_size: int
    lr: float
    num_epoch: int
    no_lr_decay: bool
    epoch_id: int | None
    parameters: float
    cfg_scale: float = 1.0


EXPERIMENTS = {
    "celeb256_dit": Experiment("celeb_f8_dit", "celeba_256", 1, 32, 2e-4, 500, True, 475, 457.1),
    "ffhq_dit": Experiment("ffhq_f8_dit", "ffhq_256", 1, 32, 2e-4, 500, False, 475, 457.1),
    "bed_dit": Experiment("bed_f8_dit", "lsun_bedroom", 1, 32, 1e-4, 600, True, 550, 457.1),
    "church_dit": Experiment("church_f8_dit", "lsun_church", 2, 48, 1e-4, 600, True, 575, 457.1),
    "imnet_dit": Experiment("imnet_f8_ditb2", "imagenet_256", 8, 160, 1e-4, 1000, True, 875, 130.5, 1.5),
    "imnet_adm": Experiment("imnet_f8_adm", "imagenet_256", 8, 96, 1e-4, 1200, True, 1125, 407.4, 1.25),
    "celeb256_adm": Experiment("celeba_f8_adm", "celeba_256", 1, 112, 2e-5, 500, False, 480, 153.1),
    "celeb512_adm": Experiment("celeb512_f8_adm", "celeba_512", 8, 6, 2e-5, 1000, True, 425, 352.2),
    "ffhq_adm": Experiment("ffhq_f8_adm", "ffhq_256", 1, 128, 2e-5, 500, False, 325, 406.4),
    "bed_adm": Experiment("bed_f8_adm", "lsun_bedroom", 1, 128, 1e-5, 500, True, 425, 406.4),
    "church_adm": Experiment("church_f8_adm", "lsun_church", 1, 128, 1e-5, 500, True, 425, 406.4),
    "celeb1024_adm": Experiment("celeb1024_f8_adm", "celeba_1024", 8, 6, 2e-5, 1000, True, None, 531.8),
    "inpainting_kl": Experiment("inpainting_kl", "celeba_256", 2, 64, 5e-5, 500, False, None, 356.1),
    "semantic_kl": Experiment("semantic_kl", "celeba_256", 2, 64, 5e-5, 175, False, None, 356.1),
}
OWN = {  # parameters in millions of this repository's own experiments, for latents of four channels
    "fashion_mnist_dit": 1.9, "fashion_mnist_inpainting": 1.9, "fashion_mnist_semantic": 1.9,
    "fashion_mnist_pixel_unet": 1.3, "mnist_latent_dit": 129.5, "folder_dit": 129.7, "folder_small": 5.5,
    "imnet_dit_modern": 677.9, "celeb256_dit_modern": 459.2,
    "fashion_mnist_few_steps": 1.9, "imnet_few_steps": 130.5,
    "imnet_sit": 675.1, "imnet_repa": 681.7, "imnet_lightningdit": 675.3, "imnet_meanflow": 676.7,  # other projects' recipes
}  # fmt: skip
WITHOUT_TRAINING = {"imnet_rae"}  # other projects' protocols of sampling alone
BUNDLED = {"pretrained/fashion_mnist_autoencoder": 4, "pretrained/fashion_mnist_autoencoder_v2": 4}
# All other autoencoders have factor 8.
FACTORS = {"none": 1, **BUNDLED, "vavae-imagenet256-f16d32-dinov2.pt": 16}
HALF_PRECISION = {"celeb512_adm", "celeb1024_adm"}


class ParsingReachedError(Exception):
    """Raised instead of parsing flags."""


@cache
def parser_of(script):
    """A script's option groups and the flags that it ignores. Runs the script until it would parse its flags."""
    stop = mock.patch("runtime.processes.launch.parse_options", side_effect=ParsingReachedError)
    with stop as parse_options, pytest.raises(ParsingReachedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    (_, groups), named = parse_options.call_args
    assert LaunchOptions in groups
    return groups, {name: named[name] for name in ("ignored", "adjust") if name in named}


def parse(kind, *flags, task="generate"):
    groups, settings = parser_of(f"{kind}_flow_latent{SCRIPTS[task]}.py")
    return parse_options("", groups, [str(flag) for flag in flags], **settings)


def path_of(kind, name):
    return ROOT / f"{kind}_args" / f"{name}.txt"


def task_of(kind, name):
    return (re.findall(r"^TASK=(\w+)$", path_of(kind, name).read_text(), re.M) or ["generate"])[0]


def parse_file(kind, name):
    return parse(kind, "--args_file", path_of(kind, name), task=task_of(kind, name))


def network_of(options):
    """The model type and family options of a network at evaluation."""
    model_type = options[NetworkOptions].resolve()
    return model_type, replace(options[NETWORKS[model_type].options], use_grad_checkpointing=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_arguments_file_is_a_known_experiment(kind):
    known = EXPERIMENTS.keys() | OWN.keys() | (WITHOUT_TRAINING if kind == "test" else set())
    assert {path.stem for path in (ROOT / f"{kind}_args").iterdir()} == known


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_recipe(name):
    expected, options = EXPERIMENTS[name], parse_file("train", name)
    training, data = options[TrainingOptions], options[DatasetOptions]
    assert (
        Experiment(
            options[ExperimentOptions].exp,
            data.dataset,
            int((re.findall(r"^NUM_PROCESS_PER_NODE=(\d+)$", path_of("train", name).read_text(), re.M) or [1])[0]),
            training.batch_size,
            training.lr,
            training.num_epoch,
            training.no_lr_decay,
            expected.epoch_id,
            expected.parameters,
            expected.cfg_scale,
        )
        == expected
    )
    assert training.lr_schedule == "cosine"
    assert options[AutoencoderOptions] == AutoencoderOptions(scale_factor=0.18215, f=8)
    assert (options[MachineOptions].precision == "bf16") == (name in HALF_PRECISION)
    assert network_of(options)[1].num_out_channels == 4
    checkpointed = options[NETWORKS[options[NetworkOptions].resolve()].options].use_grad_checkpointing
    assert checkpointed == (name == "imnet_dit")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_sampling(name):
    expected, options = EXPERIMENTS[name], parse_file("test", name)
    source, solver = options[SourceOptions], options[SolverOptions]
    assert (source.exp, source.epoch_id) == (expected.exp, expected.epoch_id)
    assert (solver.method, solver.num_steps) == ("dopri5", 0)
    assert options[GuidanceOptions].cfg_scale == expected.cfg_scale
    assert options[DatasetOptions].dataset == expected.dataset


@pytest.mark.parametrize("name", [*EXPERIMENTS, *OWN])
def test_parameter_count(name):
    options = parse_file("train", name)
    size = options[DatasetOptions].image_size // FACTORS.get(options[AutoencoderOptions].pretrained_autoencoder_ckpt, 8)
    with torch.device("meta"):
        network = build_network(*network_of(options)[:1], size, network_of(options)[1])
    assert all(parameter.is_meta for parameter in network.parameters())
    expected = OWN[name] if name in OWN else EXPERIMENTS[name].parameters
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == expected


def test_recipe_of_the_pixel_unet():
    options, test = (parse_file(kind, "fashion_mnist_pixel_unet") for kind in KINDS)
    training, data = options[TrainingOptions], options[DatasetOptions]
    assert (data.dataset, data.image_size) == ("fashion_mnist", 28)
    assert options[AutoencoderOptions].pretrained_autoencoder_ckpt == "none"
    assert options[NetworkOptions].resolve() == "unet"
    assert options[PathOptions].time_sampling == "uniform"
    assert (training.lr, training.batch_size, training.num_epoch, training.max_steps) == (1e-3, 256, 10, 0)
    assert_adam(training)
    for solver in (options[SolverOptions], test[SolverOptions]):
        assert (solver.method, solver.num_steps, solver.time_grid) == ("euler", 100, "uniform")
    for grid in (options[GridOptions], test[GridOptions]):
        assert (grid.count(1), grid.columns(1)) == (128, 16)


def test_recipe_of_the_latent_dit():
    options, test = (parse_file(kind, "mnist_latent_dit") for kind in KINDS)
    training, data = options[TrainingOptions], options[DatasetOptions]
    assert (data.dataset, data.image_size) == ("mnist", 32)
    assert options[AutoencoderOptions] == AutoencoderOptions("stabilityai/sd-vae-ft-ema")
    model_type, network = network_of(options)
    assert (model_type, network.classes, network.label_dropout) == ("DiT-B/2", 1, 0)
    assert (options[PathOptions].sigma_min, options[PathOptions].time_sampling) == (1e-3, "stratified")
    assert (training.lr, training.batch_size, training.num_epoch, training.max_steps) == (1e-4, 32, 500, 0)
    assert_adam(training)
    for solver in (options[SolverOptions], test[SolverOptions]):
        assert SOLVERS[solver.method].adaptive
    for grid in (options[GridOptions], test[GridOptions]):
        assert (grid.count(1), grid.columns(1)) == (16, 4)


def assert_adam(training):
    """Check for AdamW without weight decay, with Adam's default betas and a constant learning rate."""
    assert (training.optimizer, training.weight_decay, training.adam_betas) == ("adamw", 0, (0.9, 0.999))
    assert (training.no_lr_decay, training.warmup_steps, training.grad_clip) == (True, 0, 0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_test_file_describes_the_network_without_the_train_file(name):
    """LFM's published checkpoints have no header, so the test file must describe the network."""
    train, test = parse_file("train", name), parse_file("test", name)
    assert network_of(test) == network_of(train)
    assert test[DatasetOptions] == train[DatasetOptions]


@pytest.mark.parametrize("name", [*EXPERIMENTS, *OWN])
def test_train_and_test_files_agree(name):
    train, test = parse_file("train", name), parse_file("test", name)
    assert test[SourceOptions].exp == train[ExperimentOptions].exp
    assert task_of("train", name) == task_of("test", name)
    epoch = test[SourceOptions].epoch_id
    if epoch is not None:
        assert epoch % train[ExperimentOptions].save_ckpt_every == 0, "training does not save this epoch's checkpoint"
        assert epoch <= train[TrainingOptions].num_epoch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_first_line_describes_the_experiment(kind, name):
    first, *others = path_of(kind, name).read_text().splitlines()
    gpus, batch_size = EXPERIMENTS[name].gpus, EXPERIMENTS[name].batch_size
    assert first.startswith(f"# LFM's {EXPERIMENTS[name].exp} ")
    assert first.endswith(f"{gpus} GPU{'s' if gpus > 1 else ''}, batch size {batch_size}{' each' if gpus > 1 else ''}.")
    assert not any(line.startswith("#") for line in others)


def test_several_keys_on_one_line_are_parsed(tmp_path):
    path = tmp_path / "celeb256_dit.txt"
    path.write_text(
        "MODEL_TYPE=DiT-L/2 EPOCH_ID=475 DATASET=celeba_256 EXP=celeb_f8_dit METHOD=dopri5 STEPS=0 "
        "USE_ORIGIN_ADM=False IMG_SIZE=256\n"
    )
    assert parse("test", "--args_file", path).explicit == {
        "model_type", "epoch_id", "dataset", "exp", "method", "num_steps", "use_origin_adm", "image_size",
    }  # fmt: skip


PUBLISHED_DEFAULTS = {  # of the network options in LFM's training and test scripts
    "model_type": "adm", "image_size": 32, "nf": 256, "num_res_blocks": 2, "attn_resolutions": (16,),
    "ch_mult": (1, 1, 2, 2, 4, 4), "dropout": 0, "label_dim": 0, "num_classes": None, "label_dropout": 0,
    "use_origin_adm": False, "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False,
    "resamp_with_conv": True, "num_heads": 4, "num_head_upsample": -1, "num_head_channels": -1,
    "pretrained_autoencoder_ckpt": "stabilityai/sd-vae-ft-mse", "datadir": "./data",
}  # fmt: skip
TRAINING_DEFAULTS = PUBLISHED_DEFAULTS | {
    "seed": 1024, "resume": False, "use_grad_checkpointing": False, "batch_size": 128, "num_epoch": 1200, "lr": 5e-4,
    "adam_betas": (0.9, 0.999), "no_lr_decay": False, "ema_decay": 0.9999, "save_content_every": 10,
    "save_ckpt_every": 25, "plot_every": 5,
}  # fmt: skip
SAMPLING_DEFAULTS = PUBLISHED_DEFAULTS | {
    "seed": 42, "compute_fid": False, "n_sample": 50000, "cfg_scale": 1.0, "num_steps": 40, "batch_size": 200,
    "atol": 1e-5, "rtol": 1e-5, "method": "dopri5",
}  # fmt: skip
# Defaults that differ from LFM's (docs/lab-notes/lfm-commands.md): the autoencoder sets f, scale_factor and the channels.
OWN_DEFAULTS = {
    "dataset": "fashion_mnist",
    "f": None,
    "scale_factor": None,
    "num_in_channels": 4,
    "num_out_channels": 4,
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("train", TRAINING_DEFAULTS | OWN_DEFAULTS | {"use_ema": True, "save_content": True}),
        ("test", SAMPLING_DEFAULTS | OWN_DEFAULTS | {"step_size": None}),
    ],
)
def test_defaults(kind, expected):
    values = parse(kind).values
    assert {name: values[name] for name in expected} == expected


NETWORK_FLAGS = (
    "--image_size 32 --f 8 --scale_factor 0.18215 --num_in_channels 3 --num_out_channels 3 --nf 256 --num_res_blocks 2 "
    "--attn_resolution 16 8 --ch_mult 1 1 2 2 4 4 --dropout 0.1 --label_dim 10 --augment_dim 0 --num_classes 10 "
    "--label_dropout 0.1 --layout --use_origin_adm --use_scale_shift_norm True --resblock_updown False "
    "--use_new_attention_order False --centered False --resamp_with_conv True --num_heads 4 --num_head_upsample -1 "
    "--num_head_channels -1 --pretrained_autoencoder_ckpt stabilityai/sd-vae-ft-mse --exp x --dataset cifar10 "
    "--datadir ./data --num_timesteps 200 --model_type ddpm++"
).split()
TRAINING_FLAGS = (
    "--seed 1 --resume --model_ckpt model_475.pth --use_grad_checkpointing --batch_size 64 --num_epoch 12 --lr 5e-4 "
    "--beta1 0.5 --beta2 0.9 --no_lr_decay --use_ema --ema_decay 0.99 --save_content --save_content_every 1 "
    "--save_ckpt_every 2 --plot_every 5"
).split()
SAMPLING_FLAGS = (
    "--generator determ --seed 42 --compute_fid --compute_nfe --measure_time --epoch_id 475 --n_sample 100 --cfg_scale 1 "
    "--output_log x.log --real_img_dir real --num_steps 40 --batch_size 20 --use_karras_samplers --atol 1e-4 --rtol 1e-4 "
    "--method heun --step_size 0.01 --perturb"
).split()
# These flags print a note that they have no effect. All other flags must become options.
WITHOUT_EFFECT = {"augment_dim", "layout", "centered", "num_timesteps"}


def test_published_training_flags(capsys):
    options = parse("train", *NETWORK_FLAGS, *TRAINING_FLAGS)
    assert notes(capsys) == WITHOUT_EFFECT | {"beta1", "beta2"}
    assert (options[ExperimentOptions].init_from, options[ExperimentOptions].save_ckpt_every) == ("model_475.pth", 2)
    assert options.values["attn_resolutions"] == (16, 8)
    assert options[NetworkOptions].resolve() == "origin_adm"


def test_published_sampling_flags(capsys):
    options = parse("test", *NETWORK_FLAGS, *SAMPLING_FLAGS)
    assert notes(capsys) == WITHOUT_EFFECT | {"use_karras_samplers", "perturb"}
    sampling = options[SamplingOptions]
    assert (sampling.output_log, sampling.real_img_dir, options[SourceOptions].generator) == ("x.log", "real", "determ")
    assert options[SolverOptions].step_size == 0.01


def notes(capsys):
    """The flags that a note reports as having no effect. Each must be reported once."""
    found = re.findall(r"^note: --(\w+) has no effect here: .+$", capsys.readouterr().err, re.M)
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("task", ["inpaint", "semantic"])
def test_own_downstream_experiments(task):
    name = {"inpaint": "fashion_mnist_inpainting", "semantic": "fashion_mnist_semantic"}[task]
    assert task_of("train", name) == task_of("test", name) == task
    train, test = parse_file("train", name), parse_file("test", name)
    assert complete_network(train, guided_diffusion=True)[NetworkOptions].resolve() == "DiT-Mi/2"
    assert train[SolverOptions] == test[SolverOptions] == SolverOptions("heun", 8)
    wanted = test[ConditionedOptions]
    assert (wanted.n_sample, wanted.batch_size, wanted.compute_fid) == (2000, 500, True)
    assert train[ConditionOptions].condition_dropout == {"inpaint": 0, "semantic": 0.1}[task]
    assert train[GuidanceOptions] == test[GuidanceOptions]
    if task == "inpaint":
        assert train[MaskOptions].mask_kind == test[MaskOptions].mask_kind == "mixed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["inpaint", "semantic"])
def test_downstream_tasks_default_to_guided_diffusions_network(kind, task):
    def network(*flags):
        return complete_network(parse(kind, *flags, task=task), guided_diffusion=True)[NetworkOptions].resolve()

    assert network() == network("--use_origin_adm", "--model_type", "adm") == "origin_adm"
    assert network("--model_type", "DiT-B/2") == "DiT-B/2"
    assert network("--no-use_origin_adm") == "adm"


@pytest.mark.parametrize("task", ["inpaint", "semantic"])
def test_published_flags_of_the_downstream_scripts(task, capsys):
    options = parse("train", *NETWORK_FLAGS, *TRAINING_FLAGS, task=task)
    assert notes(capsys) == WITHOUT_EFFECT | {"beta1", "beta2"}
    assert options[ExperimentOptions].init_from == "model_475.pth"
    options = parse("test", *NETWORK_FLAGS, *SAMPLING_FLAGS, task=task)
    assert notes(capsys) == WITHOUT_EFFECT | {
        "use_karras_samplers", "perturb", "compute_nfe", "measure_time", "real_img_dir",
    }  # fmt: skip
    assert (options[ConditionedOptions].n_sample, options[ConditionedOptions].output_log) == (100, "x.log")
