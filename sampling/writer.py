"""Samples on disk, as one image file per sample or in one npz file. An interrupted command resumes when it is repeated.

A folder of samples holds 000000.png, ... (or .jpg) and samples.npz with `indices`, `labels`, `evaluations` and
`network_evaluations` [N]; in the format npz also `images` uint8 [N, H, W, C]. If some samples were not finite, the column
`finite`, bool [N], says which. samples.json records the samples' settings.
During sampling, each batch writes its images first and then its part of samples.npz, such as samples.part_000000.npz.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from options import UsageError, as_json
from runtime.distributed import Processes
from runtime.files import UNREADABLE, atomic_path, read_json, write_json
from runtime.messages import note
from runtime.progress import progress_bar
from sampling.sampler import GeneratedBatch

__all__ = ["FORMATS", "SampleWriter", "read_or_draw"]

FORMATS = ("png", "jpg", "npz")
COLUMNS = ("indices", "labels", "evaluations", "network_evaluations")
FINITE = "finite"


class SampleWriter:
    """Writes batches of samples to a folder, and reads samples that are already there.

    Args:
        folder: created if it does not exist.
        kind: one of FORMATS.
        settings: everything that the samples depend on; must equal the folder's samples.json if there is one.
        processes: each writes the samples that it draws.

    Raises:
        UsageError: the folder holds samples with other or unknown settings.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        settings: Mapping[str, Any],
        processes: Processes = Processes(),  # noqa: B008
    ) -> None:
        self.folder = folder
        self.kind = kind
        self._processes = processes
        with processes.main_first():  # the main process writes samples.json, and the others check it
            self._check({"format": kind, **as_json(settings)})

    def held(self, wanted: range) -> set[int]:
        """The samples among `wanted` that the folder already holds completely."""
        return {int(i) for table in self._tables() for i in table["indices"] if int(i) in wanted and self._has(int(i))}

    def read(self, wanted: set[int], batch_size: int) -> Iterator[GeneratedBatch]:
        """Read the samples `wanted`, at most `batch_size` at a time. Images from JPEG files differ from the samples."""
        missing = set(wanted)
        for table in self._tables():
            rows = [row for row, index in enumerate(table["indices"].tolist()) if index in missing]
            missing -= set(table["indices"].tolist())
            for first in range(0, len(rows), batch_size):
                yield self._batch(table, rows[first : first + batch_size])

    def add(self, batch: GeneratedBatch) -> None:
        """Write a batch."""
        if self.kind != "npz":
            encoding = {"png": "PNG", "jpg": "JPEG"}[self.kind]
            for index, image in zip(batch.indices, batch.images, strict=True):
                with atomic_path(self._path(index), durable=False) as temporary:
                    to_pil_image(image).save(temporary, format=encoding)
        table = {
            "indices": np.array(batch.indices),
            **{name: getattr(batch, name).numpy() for name in COLUMNS[1:]},
            **({"images": batch.images.permute(0, 2, 3, 1).numpy()} if self.kind == "npz" else {}),
            **({FINITE: ~np.isin(batch.indices, batch.not_finite)} if batch.not_finite else {}),
        }
        _write_table(self.folder / f"samples.part_{batch.indices[0]:06d}.npz", table, durable=False)

    def close(self) -> None:
        """Merge the parts into samples.npz, ordered by index. Every process must call this."""
        self._processes.barrier()
        if not self._processes.is_main:
            return
        parts = sorted(self.folder.glob("samples.part_*.npz"))
        if not parts:
            return
        tables = list(self._tables())
        if any(FINITE in table for table in tables):
            tables = [{FINITE: np.ones(len(table["indices"]), bool), **table} for table in tables]
        whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        _, order = np.unique(whole["indices"], return_index=True)
        _write_table(self.folder / "samples.npz", {name: column[order] for name, column in whole.items()})
        for part in parts:
            part.unlink()

    def _batch(self, table: Mapping[str, np.ndarray], rows: list[int]) -> GeneratedBatch:
        columns = {name: torch.from_numpy(table[name][rows]) for name in COLUMNS}
        indices = columns.pop("indices").tolist()
        if self.kind == "npz":
            images = torch.from_numpy(table["images"][rows]).permute(0, 3, 1, 2)
        else:
            images = torch.stack([self._read_file(self._path(index)) for index in indices])
        not_finite = np.array(indices)[~table[FINITE][rows]].tolist() if FINITE in table else ()
        return GeneratedBatch(indices, images, **columns, not_finite=tuple(not_finite))

    def _read_file(self, path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return pil_to_tensor(image)
        except UNREADABLE as error:
            raise UsageError(
                f"cannot read the sample {path}: {error}; delete it, and the same command draws it again"
            ) from error

    def _check(self, settings: dict[str, Any]) -> None:
        manifest = self.folder / "samples.json"
        if manifest.exists():
            before = _flat(read_json(manifest))
            now = _flat(settings)
            changed = [f"{name} was {before.get(name)}, now {now.get(name)}" for name in {**before, **now}
                       if before.get(name) != now.get(name)]  # fmt: skip
            if changed:
                raise UsageError(
                    f"{self.folder} holds samples with other settings ({'; '.join(changed)}): empty it, or choose another "
                    "--output_dir"
                )
            return
        if any(self.folder.glob(f"*.{self.kind}")):
            raise UsageError(
                f"{self.folder} already holds {self.kind} files, which would be scored with these samples: empty it first"
            )
        write_json(manifest, settings)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.{self.kind}"

    def _has(self, index: int) -> bool:
        return self.kind == "npz" or (self._path(index).is_file() and self._path(index).stat().st_size > 0)

    def _tables(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the tables of samples.npz and its parts. Parts that a power failure damaged are skipped."""
        for path in sorted(self.folder.glob("samples*.npz")):
            try:
                with np.load(path) as archive:  # never unpickles
                    yield {name: archive[name] for name in archive.files}
            except UNREADABLE:
                if path.name == "samples.npz":
                    raise UsageError(f"cannot read {path}: delete it and repeat the command") from None


def read_or_draw(
    wanted: range,
    draw: Callable[[Sequence[int]], Iterator[GeneratedBatch]],
    writer: SampleWriter | None,
    batch_size: int,
    processes: Processes = Processes(),  # noqa: B008
    reread: bool = True,
) -> Iterator[GeneratedBatch]:
    """Read this process's share of the samples in the writer's folder, then draw and write its share of missing samples.

    Args:
        wanted: indices of all samples.
        draw: draws this process's share of the samples with given indices.
        writer: reads and writes the samples; None: all samples are drawn, and none are written.
        batch_size: number of samples to read at a time.
        processes: share the work.
        reread: whether to use the samples in the folder; if not, all are drawn and written again.
    """
    held = processes.from_main(writer.held(wanted) if writer is not None and reread and processes.is_main else set())
    if writer is not None and held:
        note(f"{writer.folder} already holds {len(held)} of {len(wanted)} samples")
        yield from writer.read(set(processes.share(sorted(held))), batch_size)
    missing = [index for index in wanted if index not in held]
    with progress_bar(total=len(missing), desc="sampling", unit="image") as bar:
        for batch in draw(missing):
            if writer is not None:
                writer.add(batch)
            bar.update(min(len(batch.indices) * processes.count, len(missing) - bar.n))  # the others draw as many
            yield batch
        bar.update(len(missing) - bar.n)


def _write_table(path: Path, table: Mapping[str, np.ndarray], durable: bool = True) -> None:
    with atomic_path(path, durable=durable) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **table)  # type: ignore[arg-type]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping. Names of nested entries are joined by dots."""
    items: Iterable[tuple[str, Any]] = value.items()
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat
