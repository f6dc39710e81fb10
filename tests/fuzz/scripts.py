"""The entry scripts, their declared options, and small commands that succeed on `materials`."""

import dataclasses
import runpy
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import command_line
from options import argument_type

__all__ = ["ROOT", "SCRIPTS", "Declared", "command_of", "declared_options", "run_entry"]

ROOT = Path(__file__).resolve().parents[2]

MACHINE = "--device cpu --precision fp32"
SOLVER = "--method euler --num_steps 2"
PHOTOS = "--dataset folder --datadir photos --image_size 8"
FACES = "--dataset celeba --datadir faces --image_size 8"
PIXELS = "--pretrained_autoencoder_ckpt none"
CLASSES = "--num_classes 2 --label_dropout 0.1"
DIT = "--model_type DiT-Mi/4"
STEPS = f"--batch_size 4 --max_steps 2 --log_every 1 --grid_samples 2 --no-compile {SOLVER} {MACHINE}"
ADM = "--model_type adm --nf 32 --ch_mult 1 2 --num_res_blocks 1 --attn_resolutions 4"
ORIGIN = "--use_origin_adm --nf 32 --ch_mult 1 2 --num_res_blocks 1 --attn_resolutions 2"
SAMPLES = f"--n_sample 4 --batch_size 2 --no-compile {SOLVER} {MACHINE}"
PUBLISHED = f"--checkpoint published/model_5.pth --model_type DiT-Mi/4 {PIXELS} --dataset folder --image_size 8"
FASHION = "--dataset fashion_mnist --datadir idx"
PACKED = ("tars", "tables", "images.npz", "edm/images.zip")  # images in other projects' formats
ENCODED = ("shards", "edm/vae-sd")  # latents
LATENTS = "--pretrained_autoencoder_ckpt ae --model_type DiT-Mi/2"

# By script: commands with the values that cases vary. A module is written with dots. Words without `--` that come first are
# positional.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "train_flow_latent.py": (
        f"{PHOTOS} {PIXELS} {DIT} {STEPS} --save_root new --eval_samples 4 --features inception",
        f"{PHOTOS} {LATENTS} {CLASSES} {STEPS} --save_root new",
        f"{PHOTOS} {PIXELS} {DIT} {CLASSES} {STEPS} --save_root saved --exp run --resume --max_steps 4 --posthoc_ema 0.05 0.1",
        f"{PHOTOS} {PIXELS} {ADM} {STEPS} --save_root new --label_dim 2 --label_dropout 0.1",
        f"{PHOTOS} {PIXELS} {ORIGIN} {STEPS} --save_root new",
        f"{PHOTOS} {PIXELS} {DIT} {STEPS} --save_root new --init_from published/model_5.pth",
        f"{FASHION} {PIXELS} {DIT} {STEPS} --save_root new --image_size 28",
        f"--dataset latent_imagenet_256 --datadir latents --image_size 16 {LATENTS} {STEPS} --save_root new",
        *(
            f"--dataset folder --datadir {name} --image_size 8 {PIXELS} {DIT} {STEPS} --save_root new"
            for name in PACKED
        ),
        *(f"--dataset folder --datadir {name} --image_size 16 {LATENTS} {STEPS} --save_root new" for name in ENCODED),
        f"--dataset celeba_256 --datadir lmdb --image_size 8 {PIXELS} --model_type unet --nf 8 {STEPS} --save_root new",
        f"{PHOTOS} {PIXELS} {DIT} {STEPS} --save_root new --until_embedding interval --objective alpha_flow",
        "--args_file arguments.txt",
    ),
    "train_flow_latent_inpainting.py": (f"{PHOTOS} {PIXELS} {DIT} {STEPS} --save_root new",),
    "train_flow_latent_semantic_syn.py": (f"{FACES} {PIXELS} {DIT} {STEPS} --save_root new",),
    "train_autoencoder.py": (
        f"{PHOTOS} --output new --widths 8 16 --latent_channels 2 --max_steps 2 --batch_size 4 {MACHINE}",
    ),
    "train_classifier.py": (f"{PHOTOS} --output new --widths 8 16 --max_steps 2 --batch_size 4 {MACHINE}",),
    "test_flow_latent.py": (
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --compute_fid",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --compute_fid --real_img_dir statistics.npz --metrics fid kid",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --save_images png --output_dir new --labels labels.txt",
        f"{PUBLISHED} {SAMPLES}",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --guide_checkpoint guide.safetensors --cfg_scale 2",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --mode invert --pictured 2",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --mode interpolate --pictured 2 --frames 3 --seeds 1 2",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --mode trajectory --pictured 2 --frames 3 --gif",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --measure_time --time_batch_sizes 1 --time_repeats 1",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES} --compute_nll --compute_nfe",
        f"--exp latent --save_root saved {PHOTOS} {SAMPLES} --pretrained_autoencoder_ckpt ae",
    ),
    "test_flow_latent_inpainting.py": (
        f"--exp inpaint --save_root saved {PHOTOS} {SAMPLES} --mask_dir masks",
        f"--exp run --save_root saved {PHOTOS} {SAMPLES}",
    ),
    "test_flow_latent_semantic_syn.py": (f"--exp semantic --save_root saved {FACES} {SAMPLES}",),
    "pytorch_fid/fid_score.py": (
        "pictures photos/train --features inception",
        "pictures folder --datadir photos --features inception --image_size 8 --metrics fid kid precision coverage",
        "images.npz statistics.npz --features inception",
        "pictures pictures --features fashion_mnist --metrics is sfid --error_bar",
        "images.npz lmdb/train.lmdb --features inception --metrics kid",
    ),
    "pytorch_fid/cal_inpainting.py": ("pictures completed --features inception",),
    "pytorch_fid/compute_dataset_stat.py": (
        f"{PHOTOS} --features inception --output new.npz --device cpu",
        f"{FASHION} --image_size 28 --output new.npz --device cpu",
    ),
    "evaluation.reconstruction": (
        f"{PHOTOS} --pretrained_autoencoder_ckpt ae --features inception --picture new.png --output_json new.json",
    ),
    "evaluation.excess_loss": (
        "guide.safetensors --datadir photos --times 2 --points 4 --output_dir new --device cpu",
    ),
    "evaluation.wasserstein_bound": (
        "guide.safetensors --datadir photos --times 2 --points 4 --paths 2 --samples 16 --lanczos_steps 1 --output_dir new "
        "--device cpu",
    ),
    "checkpoints.convert": (
        f"published/model_5.pth new.safetensors {DIT} {PIXELS} --dataset folder --image_size 8",
        "guide.safetensors new.pth",
    ),
    "checkpoints.export": ("guide.safetensors new --method euler --num_steps 2",),
    "datasets_prep.tiles.__main__": ("--source pictures --output new --tile_size 4 --scales 4 8",),
    "datasets_prep.build_latents": (
        f"{PHOTOS} --pretrained_autoencoder_ckpt ae {MACHINE}",
        f"{PHOTOS} --pretrained_autoencoder_ckpt ae {MACHINE} --format lightningdit --latent_shards_dir new",
    ),
    "evaluation.report.__main__": ("saved/latent_flow/folder/run --output new.html",),
    "datasets_prep.build_pairs": (
        f"--exp run --save_root saved {PHOTOS} --pairs new --n_pairs 4 --batch_size 2 {SOLVER} {MACHINE}",
    ),
    "datasets_prep.build_lmdb": ("--source pictures --datadir new --image_size 8 --num_workers 1",),
    "datasets_prep.celebamask": ("faces --num_workers 1",),
    "training.posthoc_ema": (
        "saved/latent_flow/folder/run --sigma_rel 0.05 0.08",
        f"saved/latent_flow/folder/run --sigma_rel 0.05 0.08 {PHOTOS} {SAMPLES} --compute_fid --cfg_scales 1 2",
        f"saved/latent_flow_inpaint/folder/inpaint --sigma_rel 0.08 {PHOTOS} {SAMPLES} --compute_fid --mask_dir masks",
    ),
    "datasets_prep.masks": ("new.png --size 8 --count 10",),
    "datasets_prep.unpack_imagenet": ("--datadir archives",),
}


class Declared(NamedTuple):
    """An option as its script declares it.

    Args:
        kind: int, float, bool or str.
        many: whether it takes several values.
        default: the default.
        metadata: what `options.option` was given.
    """

    name: str
    kind: type
    many: bool
    default: Any
    metadata: typing.Mapping[str, Any]


class _Read(BaseException):
    """Ends a script once its options are known."""


def command_of(script: str) -> list[str]:
    """The words that start a script from the project's root, after the interpreter."""
    return [script] if script.endswith(".py") else ["-m", script]


def run_entry(script: str, arguments: list[str]) -> None:
    """Run a script in this process as the interpreter would; ends with SystemExit."""
    if script.endswith(".py"):
        path = str(ROOT / script)
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")
    else:
        sys.argv = [str(ROOT / f"{script.replace('.', '/')}.py"), *arguments]
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def declared_options(script: str) -> list[Declared]:
    """The options that a script passes to `parse_options`, which ends the script here."""
    groups: list[type] = []

    def record(description: str, found: list[type], *others: Any) -> None:
        groups.extend(found)
        raise _Read

    # Modules that have imported `parse_options` keep the function, so the first function that it calls is replaced.
    with _same_arguments(), mock.patch.object(command_line, "_make_parser", record), suppress(_Read):
        run_entry(script, ["a", "b"])
    fields = {
        field.name: (field, typing.get_type_hints(group)) for group in groups for field in dataclasses.fields(group)
    }
    return [
        Declared(name, *argument_type(hints[name]), field.default, field.metadata)
        for name, (field, hints) in fields.items()
    ]


@contextmanager
def _same_arguments() -> Iterator[None]:
    arguments = sys.argv
    try:
        yield
    finally:
        sys.argv = arguments
