"""Small datasets in other projects' formats, written from given images, labels and latents."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

__all__ = [
    "WRITERS",
    "encode",
    "random_images",
    "write_edm",
    "write_lightningdit",
    "write_npz",
    "write_parquet",
    "write_tars",
]

SIDE = 16


def random_images(count: int, seed: int = 0) -> np.ndarray:
    """Random pictures uint8 [N, 16, 16, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    """An image uint8 [H, W, 3] as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar file with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def write_tars(folder: Path, images: np.ndarray, labels: list, prefix: str = "train", shards: int = 2) -> None:
    """WebDataset's tar files, with the images and labels in order."""
    for number, part in enumerate(np.array_split(np.arange(len(images)), shards)):
        members = {}
        for row in part:
            members |= {f"{row:05d}.png": encode(images[row]), f"{row:05d}.cls": str(labels[row]).encode()}
        write_tar(folder / f"{prefix}-{number:06d}.tar", members)


def write_parquet(folder: Path, images: np.ndarray, labels: list, names: tuple[str, ...] = ("cat", "dog")) -> None:
    """A Parquet file as Hugging Face writes it, in row groups of five."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": encode(image), "path": f"{row}.png"} for row, image in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table({"image": rows, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet", row_group_size=5)


def write_arrow(folder: Path, images: np.ndarray, labels: list) -> None:
    """Arrow files as `save_to_disk` writes them."""
    import pyarrow

    rows = [{"bytes": encode(image), "path": None} for image in images]
    table = pyarrow.table({"image": rows, "label": labels})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("{}")
    with (
        pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table, max_chunksize=7)


def write_npz(folder: Path, images: np.ndarray, labels: list) -> None:
    """A reference batch of ADM."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "VIRTUAL_labeled.npz", images, np.array(labels))


def write_edm(folder: Path, moments: np.ndarray, labels: list, images: np.ndarray | None = None) -> None:
    """EDM2's latents of mean and standard deviation [N, 2 c, h, w], and the images if given."""
    for name, kind, values in (("vae-sd", "img-mean-std-{:08d}.npy", moments), ("images", "img{:08d}.png", images)):
        if values is None:
            continue
        listed = []
        for row, value in enumerate(values):
            path = folder / name / f"{row // 10:05d}" / kind.format(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(value)) if name == "images" else np.save(path, value)
            listed.append([path.relative_to(folder / name).as_posix(), int(labels[row])])
        (folder / name / "dataset.json").write_text(json.dumps({"labels": listed}))


def zip_folder(folder: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """Pack a folder's contents into a zip file next to it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def write_lightningdit(folder: Path, latents: torch.Tensor, labels: list, mirrored: torch.Tensor | None = None) -> None:
    """LightningDiT's latent shards of seven images, with statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(torch.arange(len(latents)).split(7)):
        arrays = {"latents": latents[rows].contiguous(), "labels": torch.tensor(labels)[rows]}
        if mirrored is not None:
            arrays["latents_flip"] = mirrored[rows].contiguous()
        save_file(arrays, folder / f"latents_rank00_shard{number:03d}.safetensors")
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")


# Writers of images with labels.
WRITERS = {"tar": write_tars, "parquet": write_parquet, "arrow": write_arrow, "npz": write_npz}
