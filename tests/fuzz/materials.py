"""Small valid files of every kind that the scripts read, for the commands in `scripts`."""

import io
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import scipy.io
import torch
from PIL import Image

from datasets_prep.celebamask import merge_tree
from datasets_prep.unpack_imagenet import DEVKIT, TRAIN, VALIDATION
from models.autoencoders.kl import new_autoencoder_kl
from models.dit import DiTOptions
from models.registry import build_network
from tests.written_formats import write_edm, write_lightningdit, write_parquet, write_tars, zip_folder

__all__ = ["SETUP", "write_materials"]

SIDE = 16
WNIDS = ("n01440764", "n01443537")
PARTS = {"skin": np.s_[2:14, 3:10], "hair": np.s_[0:5, 5:15]}

# Commands of `scripts` that complete the materials: the script, the number of its command, and further flags.
SETUP = (
    ("train_flow_latent.py", 2, "--max_steps 2"),
    ("train_flow_latent.py", 1, "--save_root saved --exp latent --latent_cache_dir latents --save_content"),
    ("train_flow_latent_inpainting.py", 0, "--save_root saved --exp inpaint --posthoc_ema 0.05 0.1"),
    ("train_flow_latent_semantic_syn.py", 0, "--save_root saved --exp semantic"),
    ("pytorch_fid/compute_dataset_stat.py", 0, "--output statistics.npz"),
)


def write_materials(folder: Path) -> None:
    """Write everything that needs no script."""
    _write_photos(folder)
    _write_faces(folder / "faces")
    _write_lmdb(folder / "lmdb")
    _write_archives(folder / "archives")
    _write_idx(folder / "idx")
    _write_weights(folder)
    images = np.stack([_picture(seed) for seed in range(8)])
    _write_formats(folder, images)
    np.savez(folder / "images.npz", arr_0=images)
    np.savez(folder / "reference.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    (folder / "labels.txt").write_text("0\n1\n0\n1\n")
    (folder / "names.txt").write_text("0.png\n1.png\n")
    (folder / "arguments.txt").write_text(
        "# a run\nDATASET=folder DATADIR=photos IMG_SIZE=8\nMODEL_TYPE=DiT-Mi/4 PRETRAINED_AUTOENCODER_CKPT=none\n"
        "Bs=4 MAX_STEPS=2 METHOD=euler STEPS=2 COMPILE=false SAVE_ROOT=new DEVICE=cpu PRECISION=fp32 GRID_SAMPLES=2\n"
    )


def _write_formats(folder: Path, images: np.ndarray) -> None:
    """The images in other projects' formats, and latents for the autoencoder of `_write_weights`."""
    labels = [row % 2 for row in range(len(images))]
    write_tars(folder / "tars", images, labels)
    write_parquet(folder / "tables", images, labels)
    moments = np.abs(np.random.default_rng(0).normal(size=(len(images), 4, 8, 8))).astype(np.float32)
    write_edm(folder / "edm", moments, labels, images)
    zip_folder(folder / "edm" / "images")
    write_lightningdit(folder / "shards", torch.from_numpy(moments[:, :2]), labels, torch.from_numpy(moments[:, 2:]))


def _picture(seed: int, side: int = SIDE) -> np.ndarray:
    """Four squares in random colors, uint8 [side, side, 3]."""
    colors = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return colors.repeat(side // 2, axis=0).repeat(side // 2, axis=1)


def _save(folder: Path, name: str, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def _write_photos(folder: Path) -> None:
    for split, count in (("train", 8), ("validation", 4)):
        for index in range(count):
            _save(folder / "photos" / split / ("cat", "dog")[index % 2], f"{index}.png", _picture(index))
    for index in range(6):
        _save(folder / "pictures", f"{index}.png", _picture(index))
        _save(folder / "completed", f"{index}.png", _picture(index + 1))
        _save(folder / "masks", f"{index}.png", np.pad(np.full((8, 8), 255, np.uint8), 4))


def _write_faces(folder: Path) -> None:
    tree = folder / "CelebAMask-HQ"
    for number in range(20):
        _save(tree / "CelebA-HQ-img", f"{number}.jpg", _picture(number))
        for part, region in PARTS.items():
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[region] = 255
            _save(tree / "CelebAMask-HQ-mask-anno" / "0", f"{number:05d}_{part}.png", mask)
    merge_tree(tree, 1)


def _write_lmdb(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 6), ("validation", 3)):
        with lmdb.open(str(folder / f"{split}.lmdb"), map_size=1 << 20) as base, base.begin(write=True) as transaction:
            for index in range(count):
                transaction.put(str(index).encode(), _png(index))


def _png(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_picture(seed)).save(buffer, kind)
    return buffer.getvalue()


def _pack(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _write_archives(folder: Path) -> None:
    folder.mkdir()
    classes = {f"{wnid}.tar": _pack({f"{wnid}_{i}.JPEG": _png(i, "JPEG") for i in range(2)}) for wnid in WNIDS}
    (folder / TRAIN).write_bytes(_pack(classes))
    (folder / VALIDATION).write_bytes(_pack({f"ILSVRC2012_val_{i:08d}.JPEG": _png(i, "JPEG") for i in (1, 2)}))
    rows = [(number, wnid, 0) for number, wnid in enumerate(WNIDS, start=1)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    kit = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"2\n1\n"}
    (folder / DEVKIT).write_bytes(_pack({f"data/{name}": data for name, data in kit.items()}, "w:gz"))


def _write_idx(folder: Path) -> None:
    folder.mkdir()
    for prefix, count in (("train", 12), ("t10k", 6)):
        images = np.stack([_picture(seed, 28)[..., 0] for seed in range(count)])
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())


def _write_weights(folder: Path) -> None:
    """An autoencoder, a checkpoint of LFM's published code, and content.pth of the same code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8), 2, 8, {"scaling_factor": 1.0}).save_pretrained(folder / "ae")
        network = build_network("DiT-Mi/4", 8, DiTOptions(num_in_channels=3, num_out_channels=3))
    (folder / "published").mkdir()
    torch.save(network.state_dict(), folder / "published" / "model_5.pth")
    content = {"epoch": 5, "global_step": 9, "model_dict": network.state_dict(), "optimizer": {}, "scheduler": {}}
    torch.save(content, folder / "published" / "content.pth")
