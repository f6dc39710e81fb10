"""The scripts on the device: all three tasks from images to scores, and several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("process_restored")
TASKS = {
    "fashion_mnist_dit": ("", "latent_flow"),
    "fashion_mnist_pixel_unet": ("", "latent_flow"),
    "fashion_mnist_inpainting": ("_inpainting", "latent_flow_inpaint"),
    "fashion_mnist_semantic": ("_semantic_syn", "latent_flow_mask2image"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_idx):
    folder = tmp_path_factory.mktemp("gpu") / "data"
    write_idx(folder, {"train": 300, "t10k": 60})
    return folder


def flags(kind, name, data, place, device):
    shared = ["--datadir", data, "--save_root", place / "saved", "--device", device]
    return ["--args_file", f"{kind}_args/{name}.txt", *shared]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_from_images_to_scores(name, data, tmp_path, device, call):
    script, runs = TASKS[name]
    steps = ["--batch_size", 32, "--max_steps", 12, "--log_every", 4, "--grid_samples", 8]
    solver = ["--method", "heun", "--num_steps", 4]
    code, out, err = call(
        f"train_flow_latent{script}.py", [*flags("train", name, data, tmp_path, device), *steps, *solver]
    )
    assert code == 0, err
    assert f"machine     {device}" in out
    folder = tmp_path / "saved" / runs / "fashion_mnist" / name
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if entry["kind"] == "train"]
    assert len(losses) == 3
    assert losses[-1] < 1.1 * losses[0]
    output = ["--n_sample", 40, "--batch_size", 16, "--output_json", tmp_path / "result.json", "--compute_fid", *solver]
    code, out, err = call(f"test_flow_latent{script}.py", [*flags("test", name, data, tmp_path, device), *output])
    assert code == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["value"] >= 0


def as_processes(count, name, data, place, device, *more):
    chosen = ["--batch_size", 32 // count, "--max_steps", 6, "--log_every", 1, "--num_process_per_node", count]
    machine = ["--precision", "fp32", "--no-compile", "--optimizer", "adamw", "--warmup_steps", 0]
    command = [sys.executable, "train_flow_latent.py", *flags("train", "fashion_mnist_dit", data, place, device)]
    finished = subprocess.run(
        [*map(str, [*command, *chosen, *machine, "--exp", name, *more])],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    metrics = place / "saved" / "latent_flow" / "fashion_mnist" / name / "metrics.jsonl"
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["kind"] == "train"]


def test_several_processes_agree_with_one(data, tmp_path, device, on_gpu, report):
    """DDP and FSDP2, over NCCL on GPUs. With one GPU, one process runs through the launcher's environment."""
    count = min(2, torch.cuda.device_count()) if on_gpu else 2
    kind = device.type
    alone = as_processes(1, "alone", data, tmp_path, kind)
    assert len(alone) == 6
    if count > 1:
        for name, more in (("ddp", ()), ("fsdp", ("--fsdp",))):
            assert as_processes(count, name, data, tmp_path, kind, *more) == pytest.approx(alone, rel=1e-3)
    report(f"DDP and FSDP2 in {count} processes" if count > 1 else "one GPU: DDP and FSDP2 were not run")
