"""End-to-end tests of the inpainting and semantic synthesis scripts, on small files in the datasets' real layouts."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from checkpoints.experiments import newest_model
from checkpoints.files import read_weights
from datasets_prep.celebamask import merge_tree
from evaluation.features.registry import FEATURES
from models.autoencoders.kl import new_autoencoder_kl
from runtime.messages import one_line
from runtime.torch_files import read_torch_file
from tests.fake_features import MeanColors

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("process_restored")
TASKS = {"inpaint": "_inpainting", "semantic": "_semantic_syn", "generate": ""}
RUNS = {"inpaint": "latent_flow_inpaint", "semantic": "latent_flow_mask2image", "generate": "latent_flow"}
PUBLISHED = (
    "--exp {task}_kl --dataset celeba_256 --batch_size 64 --lr 5e-5 --scale_factor 0.18215 --num_epoch {epochs} "
    "--image_size 256 --num_in_channels {channels} --num_out_channels 4 --ch_mult 1 2 3 4 --attn_resolution 16 8 "
    "--num_process_per_node 2 --save_content"
)
COMMANDS = {
    "inpaint": PUBLISHED.format(task="inpainting", epochs=500, channels=9).split(),
    "semantic": PUBLISHED.format(task="semantic", epochs=175, channels=8).split(),
}
MACHINE = ["--precision", "fp32", "--num_threads", 1, "--device", "cpu"]
SOLVER = ["--method", "euler", "--num_steps", 2]
HELD_OUT = 5
LIMIT_S = 900


def script_of(kind, task):
    return f"{kind}_flow_latent{TASKS[task]}.py"


def start(script, flags):
    """Run a script in this process and return (exit code, stdout, stderr)."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return ended.value.code, out.getvalue(), err.getvalue()


def run(script, flags):
    """Run a script that must succeed, and return its stdout."""
    code, out, err = start(script, flags)
    assert code == 0, err
    return out


def notes_of(script, flags):
    """Run a script that must succeed, and return its stderr."""
    code, _, err = start(script, flags)
    assert code == 0, err
    return err


def refusal(script, flags):
    """Run a script that must refuse its flags, and return its error line."""
    code, _, err = start(script, flags)
    assert code == 2, err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in err
    return line


def picture(seed, side):
    """An image of four squares in random colors, uint8 [side, side, 3]."""
    colors = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return colors.repeat(side // 2, axis=0).repeat(side // 2, axis=1)


def write_celeba(folder):
    """Write images in NVAE's layout: LMDBs of raw bytes."""
    folder.mkdir()
    for split, count in (("train", 4), ("validation", 3)):
        with lmdb.open(str(folder / f"{split}.lmdb"), map_size=1 << 22) as base, base.begin(write=True) as transaction:
            for index in range(count):
                transaction.put(str(index).encode(), picture(index, 64).tobytes())


def write_celebamask(folder):
    """Write 20 faces in CelebAMask-HQ's official layout, with merged label maps. Two faces are held out."""
    tree = folder / "CelebAMask-HQ"
    (tree / "CelebA-HQ-img").mkdir(parents=True)
    (tree / "CelebAMask-HQ-mask-anno" / "0").mkdir(parents=True)
    for number in range(20):
        Image.fromarray(picture(number, 64)).save(tree / "CelebA-HQ-img" / f"{number}.jpg")
        for part, region in (("skin", np.s_[4:28, 6:20]), ("l_eye", np.s_[10:14, 8:12]), ("hair", np.s_[0:10, 10:30])):
            mask = np.zeros((32, 32), np.uint8)
            mask[region] = 255
            Image.fromarray(mask).save(tree / "CelebAMask-HQ-mask-anno" / "0" / f"{number:05d}_{part}.png")
    merge_tree(tree, 1)


def write_folders(folder):
    """Write images of 16 x 16 pixels in two classes: six for training and five held out."""
    for split, count in (("train", 6), ("validation", HELD_OUT)):
        for index in range(count):
            path = folder / split / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(index + 100 * (split == "train"), 16)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    """All datasets, and in ae/ an autoencoder like Stable Diffusion's (f = 8, 4 latent channels) with a width of only 8."""
    place = tmp_path_factory.mktemp("downstream")
    write_celeba(place / "celeba")
    write_celebamask(place / "faces")
    write_folders(place / "photos")
    write_idx(place / "fashion", {"train": 40, "t10k": 12})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8, 8, 8), 4, 64, {"scaling_factor": 0.18215}).save_pretrained(place / "ae")
    return place


PIXELS = ["--pretrained_autoencoder_ckpt", "none"]
TINY = [*PIXELS, "--model_type", "DiT-Mi/4", "--batch_size", 4, "--lr", 1e-2, "--no_lr_decay", "--log_every", 1]
LABELS = ["--num_classes", 2, "--label_dropout", 0.1]


def photos(place, exp):
    return [
        "--dataset", "folder", "--datadir", place / "photos", "--image_size", 16, "--save_root", place / "saved",
        "--exp", exp, *SOLVER, *MACHINE,
    ]  # fmt: skip


def fashion(place, exp):
    return [
        "--dataset", "fashion_mnist", "--datadir", place / "fashion", "--image_size", 32, "--save_root", place / "saved",
        "--exp", exp, *SOLVER, *MACHINE,
    ]  # fmt: skip


def folder_of(place, task, exp, dataset="folder"):
    return place / "saved" / RUNS[task] / dataset / exp


@pytest.fixture(scope="module")
def labeled(place):
    """Name of an inpainting run with labels, trained with dropout of labels and conditions."""
    flags = [*photos(place, "labeled"), *TINY, *LABELS, "--condition_dropout", 0.2, "--max_steps", 6]
    run(script_of("train", "inpaint"), flags)
    return "labeled"


@pytest.fixture(scope="module")
def semantic(place):
    """Name of a semantic synthesis run trained on silhouettes."""
    flags = [*fashion(place, "maps"), *PIXELS, "--model_type", "DiT-Mi/8", "--batch_size", 8, "--max_steps", 2]
    run(script_of("train", "semantic"), flags)
    return "maps"


@pytest.fixture(scope="module")
def generator(place):
    """Checkpoint of a network trained for generation."""
    run(script_of("train", "generate"), [*photos(place, "free"), *TINY, "--max_steps", 2])
    return newest_model(folder_of(place, "generate", "free"))


def complete(place, output, *flags, exp="labeled"):
    """Inpaint into the folder `output` and return the result."""
    run(script_of("test", "inpaint"), [*photos(place, exp), "--output_dir", output, *flags])
    return json.loads((output / "result.json").read_text())


def names_in(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def pictures(folder):
    """The images in a folder, int [N, H, W] or [N, H, W, 3]."""
    return np.stack([np.asarray(Image.open(folder / name)) for name in names_in(folder)]).astype(int)


# LFM's published commands.


@pytest.mark.parametrize("task", COMMANDS)
def test_published_commands_train_sample_and_score(task, place, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURES, "inception", MeanColors)
    exp, channels, count = {"inpaint": ("inpainting_kl", 9, 3), "semantic": ("semantic_kl", 8, 2)}[task]
    data = {"inpaint": place / "celeba", "semantic": place / "faces"}[task]
    own = ["--datadir", data, "--save_root", tmp_path / "saved", "--image_size", 64, "--nf", 32, *SOLVER, *MACHINE]
    small = [*own, "--pretrained_autoencoder_ckpt", place / "ae", "--batch_size", 2, "--num_process_per_node", 1]
    out = run(script_of("train", task), [*COMMANDS[task], *small, "--max_steps", 2])
    folder = folder_of(tmp_path, task, exp, "celeba_256")
    assert out.splitlines()[-2] == "complete; sample with:"
    assert re.match(rf"  \S*python\S* {script_of('test', task)} --dataset celeba_256 --exp ", out.splitlines()[-1])
    assert read_torch_file(folder / "content.pth")["step"] == 2
    weights, header = read_weights(newest_model(folder))
    assert (header.task, header.model_type, header.latent_size) == (task, "origin_adm", 8)
    assert header.autoencoder.scale_factor == 0.18215
    assert (header.network.num_in_channels, header.network.attn_resolutions) == (channels, (16, 8))
    assert weights["input_blocks.0.0.weight"].shape == (32, channels, 3, 3)
    assert weights["out.2.weight"].shape[0] == 4
    if task == "semantic":
        assert weights["channel_mapper.weight"].shape == (4, 19, 1, 1)
    with Image.open(folder / "samples" / "step_0000002.png") as preview:
        assert np.asarray(preview).std() > 1

    flags = ["--exp", exp, "--dataset", "celeba_256", *own, "--compute_fid", "--batch_size", 2]
    out = run(script_of("test", task), [*flags, "--output_dir", tmp_path / "out", "--output_log", tmp_path / "log"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["scores"].keys() == {"fid", "p_ids", "u_ids", "psnr", "ssim"}
    assert (result["samples"], result["reference_samples"], result["nfe"]) == (count, count, 2)
    assert (tmp_path / "log").read_text().startswith(one_line("\n".join(out.splitlines()[-3:])))
    folders = {"inpaint": ["originals", "masks", "masked", "completions"], "semantic": ["originals", "maps", "samples"]}
    expected = [f"{index:06d}.png" for index in range(count)]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set(folders[task])
    for name in folders[task]:
        assert names_in(tmp_path / "out" / name) == expected
        assert pictures(tmp_path / "out" / name).shape[1:3] == (64, 64)
    if task == "inpaint":
        assert (pictures(tmp_path / "out" / "originals")[2] == picture(2, 64)).all()
        assert {"psnr_hole", "psnr_hole_mean_colour"} <= result.keys()
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 64 * len(folders[task])


# Training.


@pytest.mark.parametrize("task", ["inpaint", "semantic"])
def test_resuming_is_bit_exact(task, place):
    """Label dropout, condition dropout, mirroring and masks are all random, and depend only on the step."""
    network = [*PIXELS, "--model_type", "DiT-Mi/8", "--batch_size", 4, "--no_lr_decay", "--log_every", 1]
    dropout = [*LABELS[:-1], 0.3] if task == "inpaint" else ["--num_classes", 10, "--label_dropout", 0.3]
    flags = [*network, *dropout, "--condition_dropout", 0.3, "--optimizer", "muon", "--save_content_every_steps", 1]
    contents, records = [], []
    for exp, stops in (("steady", [7]), ("stopped", [3, 4, 7])):
        data = {"inpaint": photos, "semantic": fashion}[task](place, exp)
        for number, stop in enumerate(stops):
            resume = ["--resume"] if number else []
            out = run(script_of("train", task), [*data, *flags, "--max_steps", stop, *resume])
        folder = folder_of(place, task, exp, {"inpaint": "folder", "semantic": "fashion_mnist"}[task])
        contents.append(read_torch_file(folder / "content.pth"))
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        records.append([(e["step"], e["loss"]) for e in entries if e["kind"] == "train"])
    assert "resuming at step 4 of 7" in out
    assert records[0] == records[1]
    assert len(records[0]) == 7
    one, other = contents
    for part in (lambda content: content["network"], lambda content: content["ema"]["weights"]):
        assert part(one).keys() == part(other).keys()
        assert all(torch.equal(value, part(other)[name]) for name, value in part(one).items())
    assert ("channel_mapper.weight" in one["network"]) == (task == "semantic")
    states = [[optimizer["state"] for optimizer in content["optimizers"]] for content in contents]
    assert len(states[0]) == 2
    for first, second in zip(*states, strict=True):
        assert first.keys() == second.keys()
        for number, values in first.items():
            assert all(torch.equal(value, second[number][name]) for name, value in values.items())


def test_mistakes_in_training(place):
    inpaint, semantic = script_of("train", "inpaint"), script_of("train", "semantic")
    flags = [*photos(place, "mistake"), *TINY]
    assert re.search(
        r"--num_in_channels 9 contradicts the autoencoder.* 3 channels, and the condition adds 4 .*: use 7",
        refusal(inpaint, [*flags, "--num_in_channels", 9]),
    )
    assert "the dataset 'folder' has no label maps: expected one of celeba" in refusal(semantic, flags)
    assert "python -m datasets_prep.celebamask" not in refusal(semantic, [*flags, "--dataset", "ade20k"])
    assert "--mask_kind" in refusal(inpaint, [*flags, "--mask_kind", "dots"])
    assert "needs a network with a null class" in refusal(inpaint, [*flags, "--cfg_scale", 2])


def test_changing_the_mask_kind_of_a_run_is_refused(place, labeled):
    flags = [*photos(place, labeled), *TINY, *LABELS, "--condition_dropout", 0.2, "--max_steps", 6]
    assert "--mask_kind was mixed, now half" in refusal(script_of("train", "inpaint"), [*flags, "--mask_kind", "half"])
    assert "complete; sample with:" in run(script_of("train", "inpaint"), flags)


# Sampling.


@pytest.fixture(scope="module")
def completed(place, labeled, tmp_path_factory):
    """A folder with two completions per image, and the result."""
    folder = tmp_path_factory.mktemp("completed")
    return folder, complete(place, folder, "--num_completions", 2)


def test_output_folders_match_and_known_pixels_are_exact(place, completed):
    folder, result = completed
    kinds = ["originals", "masks", "masked", "completions", "completions_1"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(kinds)
    assert all(names_in(folder / kind) == [f"{index:06d}.png" for index in range(HELD_OUT)] for kind in kinds)
    originals, masks, masked, first, second = (pictures(folder / kind) for kind in kinds)
    order = [0, 2, 4, 1, 3]  # classes are read in order, so cats come first
    np.testing.assert_array_equal(originals, np.stack([picture(index, 16) for index in order]))
    assert set(np.unique(masks)) == {0, 255}
    holes = masks > 0
    assert result["hole_ratio"] == pytest.approx(holes.mean())
    assert len({hole.tobytes() for hole in holes}) == HELD_OUT
    for known in (masked, first, second):
        np.testing.assert_array_equal(known[~holes], originals[~holes])
    assert (masked[holes] == 128).all()
    for completion in (first, second):
        assert np.abs(completion - originals)[holes].mean() > 5
    assert np.abs(first - second)[holes].mean() > 5
    assert (result["samples"], result["completions"], result["nfe"], result["network_evaluations"]) == (
        HELD_OUT,
        2,
        2,
        2,
    )
    assert Path(result["sheet"]).is_file()
    assert "value" not in result


def test_completions_do_not_depend_on_batch_size_or_their_number(place, completed, tmp_path):
    folder, _ = completed
    complete(place, tmp_path, "--batch_size", 2)
    assert np.abs(pictures(tmp_path / "completions") - pictures(folder / "completions")).max() <= 1
    complete(place, tmp_path / "b", "--seed", 43)  # completion 1 uses the next seed
    np.testing.assert_array_equal(pictures(tmp_path / "b" / "completions"), pictures(folder / "completions_1"))


def state_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*.png"))}


def test_existing_samples_are_not_sampled_again(place, labeled, tmp_path):
    first = complete(place, tmp_path, "--n_sample", 3)
    before = state_of(tmp_path / "completions")
    assert first["samples"] == len(before) == 3
    script, flags = script_of("test", "inpaint"), [*photos(place, labeled), "--output_dir", tmp_path]
    assert "already holds 3 of 5 samples" in notes_of(script, flags)  # only the missing ones are sampled
    both = state_of(tmp_path / "completions")
    assert len(both) == HELD_OUT
    assert all(both[path] == value for path, value in before.items())
    assert "already holds 5 of 5 samples" in notes_of(script, flags)
    assert state_of(tmp_path / "completions") == both
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "completions" / "000001.png").unlink()
    assert "already holds 4 of 5 samples" in notes_of(script, flags)
    again = json.loads((tmp_path / "result.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    for path, (_, data) in state_of(tmp_path / "completions").items():
        assert (
            np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(io.BytesIO(both[path][1])))).max()
            <= 1
        )
        assert path.name == "000001.png" or data == both[path][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--mask_seed", 1], r"masks\.seed was 0, now 1"),
        (["--mask_kind", "half"], r"masks\.kind was mixed, now half"),
        (["--no-paste_known"], r"inpainting\.paste_known was True, now False"),
        (["--seed", 1], r"seed was 42, now 1"),
        (["--no-use_labels"], r"use_labels was True, now False"),
    ],
    ids=lambda value: str(value[0]).lstrip("-") if isinstance(value, list) else "",
)
def test_a_folder_with_samples_of_other_settings_is_refused(change, message, place, labeled, tmp_path):
    complete(place, tmp_path, "--n_sample", 2)
    before = state_of(tmp_path)
    flags = [*photos(place, labeled), "--output_dir", tmp_path, *change]
    assert re.search(message, refusal(script_of("test", "inpaint"), flags))
    assert state_of(tmp_path) == before  # in particular, no new mask is written


def test_guidance_leads_away_from_labels_and_condition(place, completed, tmp_path):
    folder, _ = completed
    result = complete(place, tmp_path, "--cfg_scale", 2)
    assert (result["nfe"], result["network_evaluations"]) == (2, 4)
    guided, plain = pictures(tmp_path / "completions"), pictures(folder / "completions")
    holes = pictures(folder / "masks") > 0
    assert (guided != plain)[holes].mean() > 0.1
    np.testing.assert_array_equal(guided[~holes], plain[~holes])


def test_guidance_over_the_condition_alone(place, tmp_path):
    """A network without a null class is evaluated with the same class in both terms."""
    for exp, labels in (("unlabeled", []), ("no_null_class", ["--num_classes", 2])):
        flags = [*photos(place, exp), *TINY, *labels, "--condition_dropout", 0.5, "--max_steps", 2]
        run(script_of("train", "inpaint"), [*flags, "--cfg_scale", 3])  # the preview is guided, too
        result = complete(place, tmp_path / exp, "--cfg_scale", 2, exp=exp)
        assert result["network_evaluations"] == 4
    run(script_of("train", "inpaint"), [*photos(place, "never"), *TINY, "--max_steps", 1])
    flags = [*photos(place, "never"), "--output_dir", tmp_path / "never", "--cfg_scale", 2]
    assert "--label_dropout or --condition_dropout above 0" in refusal(script_of("test", "inpaint"), flags)


def test_no_use_labels_hides_labels_from_the_network(place, completed, tmp_path):
    folder, _ = completed
    result = complete(place, tmp_path, "--no-use_labels")
    assert result["use_labels"] is False
    unlabeled, plain = pictures(tmp_path / "completions"), pictures(folder / "completions")
    holes = pictures(folder / "masks") > 0
    assert (unlabeled != plain)[holes].mean() > 0.1
    np.testing.assert_array_equal(unlabeled[~holes], plain[~holes])


def test_seams(place, completed, tmp_path):
    folder, _ = completed
    originals, holes = pictures(folder / "originals"), pictures(folder / "masks") > 0
    complete(place, tmp_path / "raw", "--no-paste_known")
    raw = pictures(tmp_path / "raw" / "completions")
    assert np.abs(raw - originals)[~holes].mean() > 5
    np.testing.assert_array_equal(raw[holes], pictures(folder / "completions")[holes])
    complete(place, tmp_path / "soft", "--feather", 2)
    soft = pictures(tmp_path / "soft" / "completions")
    for hole, one, original, sample in zip(holes, soft, originals, raw, strict=True):
        distance = ndimage.distance_transform_cdt(~hole, "chessboard")
        weight = np.clip(1 - distance / 3, 0, 1)[..., None]
        assert np.abs(one - (weight * sample + (1 - weight) * original)).max() <= 0.5 + 1e-3


def test_masks_of_a_folder(place, labeled, tmp_path):
    (tmp_path / "masks").mkdir()
    holes = np.zeros((2, 16, 16), bool)
    holes[0, 3:9, 5:12], holes[1, :, 12:] = True, True
    for name, hole in zip(("b.png", "a.png"), holes, strict=True):
        Image.fromarray(np.uint8(255 * hole)).save(tmp_path / "masks" / name)
    complete(place, tmp_path / "out", "--mask_dir", tmp_path / "masks")
    expected = np.stack([holes[1 - index % 2] for index in range(HELD_OUT)])
    np.testing.assert_array_equal(pictures(tmp_path / "out" / "masks") > 0, expected)
    Image.new("L", (16, 16)).save(tmp_path / "masks" / "a.png")
    flags = [*photos(place, labeled), "--output_dir", tmp_path / "x", "--mask_dir", tmp_path / "masks"]
    said = refusal(script_of("test", "inpaint"), flags)
    assert re.search(r"the mask .*a\.png covers nothing at 16 x 16", said)


def test_a_network_of_generation_inpaints_without_training(place, generator, tmp_path):
    script = script_of("test", "inpaint")
    flags = [*photos(place, "labeled"), "--checkpoint", generator, "--resamplings", 3, "--method", "dopri5"]
    notes = notes_of(script, [*flags, "--num_steps", 4, "--output_dir", tmp_path, "--num_completions", 2])
    assert "was trained for generation, so inpainting uses RePaint: 4 Euler steps, 3 times each" in notes
    assert "has no effect" not in notes
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["nfe"], result["solver"]["method"], result["inpainting"]["resamplings"]) == (12, "euler", 3)
    originals, holes = pictures(tmp_path / "originals"), pictures(tmp_path / "masks") > 0
    first, second = pictures(tmp_path / "completions"), pictures(tmp_path / "completions_1")
    for completion in (first, second):
        np.testing.assert_array_equal(completion[~holes], originals[~holes])
    assert np.abs(first - second)[holes].mean() > 5
    run(script, [*flags, "--num_steps", 4, "--output_dir", tmp_path / "b", "--batch_size", 2])
    assert np.abs(pictures(tmp_path / "b" / "completions") - first).max() <= 1


def test_a_script_refuses_other_tasks_networks_and_names_the_right_script(place, labeled, semantic, generator):
    inpainting = newest_model(folder_of(place, "inpaint", labeled))
    synthesis = newest_model(folder_of(place, "semantic", semantic, "fashion_mnist"))
    for task, checkpoint, said in [
        ("semantic", generator, r"was trained for generation: use test_flow_latent\.py$"),
        ("semantic", inpainting, r"was trained for inpainting: use test_flow_latent_inpainting\.py$"),
        ("generate", inpainting, r"was trained for inpainting: use test_flow_latent_inpainting\.py$"),
        ("generate", synthesis, r"was trained for semantic synthesis: use test_flow_latent_semantic_syn\.py$"),
        ("inpaint", synthesis, r"was trained for semantic synthesis: use test_flow_latent_semantic_syn\.py$"),
    ]:
        flags = ["--checkpoint", checkpoint, "--save_root", place / "saved", *SOLVER, *MACHINE]
        assert re.search(said, refusal(script_of("test", task), flags)), task


def test_semantic_synthesis_is_scored_against_its_label_maps(place, semantic, tmp_path):
    out = run(script_of("test", "semantic"), [*fashion(place, semantic), "--output_dir", tmp_path, "--compute_fid"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metric"] == "FD (fashion-mnist features)"
    assert result["extra_scores"] == ["recognised", "recognised_originals", "miou", "pixel_accuracy", "foreground_iou"]
    assert all(0 <= result[name] <= 1 for name in result["extra_scores"])
    assert f"foreground IoU {result['foreground_iou']:.4g}" in out.splitlines()[-3]
    originals, maps, samples = (pictures(tmp_path / name) for name in ("originals", "maps", "samples"))
    assert originals.shape == samples.shape == (12, 28, 28)
    assert maps.shape == (12, 28, 28, 3)
    np.testing.assert_array_equal(maps.any(-1), originals > 20)
    colors = [np.unique(image[original > 20], axis=0) for image, original in zip(maps, originals, strict=True)]
    assert [len(color) for color in colors] == [1] * 12
    assert len({color.tobytes() for color in colors}) == 10


# Several processes.


def in_two_processes(script, flags):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    command = [sys.executable, script, *map(str, flags), "--num_process_per_node", "2"]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_two_processes_complete_and_score_as_one(place, tmp_path):
    run(script_of("train", "inpaint"), [*fashion(place, "shared"), *PIXELS, "--model_type", "DiT-Mi/8", "--batch_size", 8,
        "--max_steps", 2])  # fmt: skip
    script, flags = script_of("test", "inpaint"), [*fashion(place, "shared"), "--compute_fid", "--num_completions", 2]
    out = in_two_processes(script, [*flags, "--batch_size", 5, "--output_dir", tmp_path / "2"])
    run(script, [*flags, "--batch_size", 5, "--output_dir", tmp_path / "1"])
    one, two = (json.loads((tmp_path / count / "result.json").read_text()) for count in "12")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("value", "psnr_hole", "psnr_hole_mean_colour", "recognised", "hole_ratio", "nfe", "samples"):
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    for name, score in one["scores"].items():
        assert two["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-6), name
    pictures_of = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in "12"]
    assert pictures_of[0] == pictures_of[1]
    assert len(pictures_of[0]) == 5 * 12 + 1
    assert out.count("contact_sheet.png") == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["inpaint", "semantic"])
def test_two_processes_train_as_one(task, place):
    data = {"inpaint": photos, "semantic": fashion}[task]
    network = [*PIXELS, "--model_type", "DiT-Mi/8", "--condition_dropout", 0.3, "--log_every", 1, "--max_steps", 4]
    run(script_of("train", task), [*data(place, "one"), *network, "--batch_size", 4])
    in_two_processes(script_of("train", task), [*data(place, "two"), *network, "--batch_size", 2])
    losses = []
    for exp in ("one", "two"):
        folder = folder_of(place, task, exp, {"inpaint": "folder", "semantic": "fashion_mnist"}[task])
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in entries])
        assert sum(entry["kind"] == "train" for entry in entries) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
