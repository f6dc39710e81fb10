"""Samples on the disk, when asked: one image file each, or all in one npz."""

from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image

from evaluation.generate import GeneratedBatch
from options import UsageError
from runtime.distributed import Processes
from runtime.files import atomic_path

__all__ = ["FORMATS", "SampleWriter"]

FORMATS = ("png", "jpg", "npz")


class SampleWriter:
    """Writes batches to a folder without such files: 000000.png, ..., or samples.npz.

    The npz holds `images` uint8 [N, H, W, C] and `labels` [N]. Of several processes, each writes the image files of its own
    batches; the npz is written by the main process, to which the others send theirs.
    """

    def __init__(self, folder: Path, kind: str, processes: Processes = Processes()) -> None:  # noqa: B008
        self.folder = folder
        self.kind = kind
        self._processes = processes
        self._batches: list[GeneratedBatch] = []
        folder.mkdir(parents=True, exist_ok=True)
        taken = kind != "npz" and any(folder.glob(f"*.{kind}"))
        if processes.any(taken):  # which also lets all look before one begins to write
            raise UsageError(
                f"{folder} already holds {kind} files, which would be scored with these samples: empty it first"
            )

    def add(self, batch: GeneratedBatch) -> None:
        """Write a batch, or keep it for the npz."""
        if self.kind == "npz":
            self._batches.append(batch)
            return
        encoding = {"png": "PNG", "jpg": "JPEG"}[self.kind]
        for index, image in zip(batch.indices, batch.images, strict=True):
            with atomic_path(self.folder / f"{index:06d}.{self.kind}", durable=False) as temporary:
                to_pil_image(image).save(temporary, format=encoding)

    def close(self) -> None:
        """Write the npz, if that is the format; every process must call it."""
        if self.kind != "npz":
            return
        batches = self._gathered()
        if batches:
            batches.sort(key=lambda batch: batch.indices[0])
            images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
            labels = torch.cat([batch.labels for batch in batches]).numpy()
            with atomic_path(self.folder / "samples.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, images=images, labels=labels)

    def _gathered(self) -> list[GeneratedBatch]:
        """The batches of all processes, in the main one; each sends one at a time."""
        rounds = max(self._processes.from_main(self._processes.gather(len(self._batches))))
        sent = [self._processes.gather(self._batches[i : i + 1]) for i in range(rounds)]
        return [batch for part in sent for batches in part for batch in batches]
