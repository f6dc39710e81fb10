"""Damages a file or folder in one of many ways, given by a name and a seed."""

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.faults.mutations import damaged

__all__ = ["CHANGES", "DAMAGES", "ODD_NAMES", "apply_damage"]

ODD_NAMES = ("with space", "line\nbreak", "\udce4\udcff", "ünïcode ☃", "-dash", "%s{0}", "'quote\"", "n" * 200)
VALUES: tuple[Any, ...] = (None, True, 0, -1, 10**30, 1.5, float("nan"), "", "text", [], {}, [1, "a"], {"a": 1})
DTYPES = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16, torch.uint8)


def apply_damage(path: Path, kind: str, seed: int) -> None:
    """Damage `path`, which may no longer exist. A damage that does not apply to its kind of file flips bits."""
    with suppress(Exception):  # an earlier damage may have left nothing to work on
        DAMAGES[kind](path, random.Random(seed))


def _bytes(path: Path, rng: random.Random) -> None:
    if path.is_dir():
        _inside(path, rng, "bytes")
    else:
        path.write_bytes(damaged(path.read_bytes(), np.random.default_rng(rng.getrandbits(32))))


def _values(path: Path, rng: random.Random) -> None:
    """Change names, shapes, types or numbers inside a file that stays readable."""
    if path.is_dir():
        _inside(path, rng, "values")
    elif change := CHANGES.get(path.suffix):
        change(path, rng)
    else:
        _bytes(path, rng)


def _inside(folder: Path, rng: random.Random, kind: str) -> None:
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=os.fsencode)
    if files:
        DAMAGES[kind](rng.choice(files), rng)


def _empty(path: Path, rng: random.Random) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


def _remove(path: Path, rng: random.Random) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _swap(path: Path, rng: random.Random) -> None:
    """A folder becomes a file, and a file a folder."""
    was_file = path.is_file()
    _remove(path, rng)
    path.mkdir() if was_file else path.write_bytes(b"a file")


def _loop(path: Path, rng: random.Random) -> None:
    """A link in a circle, or inside a folder one to the folder."""
    if path.is_dir() and rng.random() < 0.7:
        (path / "loop").symlink_to(rng.choice((".", "..", "loop", path.absolute())))
    else:
        _remove(path, rng)
        path.symlink_to(rng.choice((path.name, "nowhere")))


def _forbid(path: Path, rng: random.Random) -> None:
    path.chmod(rng.choice((0o000, 0o444, 0o555) if path.is_dir() else (0o000, 0o222)))


def _other(path: Path, rng: random.Random) -> None:
    """The content of another kind of file under this name."""
    others = sorted(
        (other for other in Path.cwd().rglob("*") if other.is_file() and other.suffix != path.suffix), key=str
    )
    if path.is_file() and others:
        shutil.copy(rng.choice(others), path)
    else:
        _inside(path, rng, "other")


def _odd_neighbor(path: Path, rng: random.Random) -> None:
    """A copy under an odd name next to, or in, the path."""
    files = sorted(other for other in path.rglob("*") if other.is_file()) if path.is_dir() else [path]
    source = rng.choice(files)
    shutil.copy(source, source.with_name(rng.choice(ODD_NAMES)[:200] + source.suffix))


def _change_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(_changed(json.loads(path.read_text()), rng)))


def _change_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = rng.choice(("", "{", "null", "[]", json.dumps(_changed(json.loads(lines[number]), rng))))
    path.write_text("\n".join(lines) + "\n")


def _change_text(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    lines.insert(
        rng.randrange(len(lines) + 1), rng.choice(("", "text", "-1", "9" * 40, "=", "A=", "A='", "#", "\0", "é"))
    )
    path.write_text("\n".join(lines) + "\n")


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one value somewhere in it replaced, removed or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        others = {name: item for name, item in value.items() if name != key}
        draw = rng.random()
        if draw < 0.1:
            return others
        return others | ({f"{key}_": value[key]} if draw < 0.15 else {key: _changed(value[key], rng)})
    if isinstance(value, list) and value and rng.random() < 0.7:
        number = rng.randrange(len(value))
        return rng.choice(
            (value[:-1], [*value, value[0]], [*value[:number], _changed(value[number], rng), *value[number + 1 :]])
        )
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((-value, value + 1, 2 * value, value / 2, 0))
    return rng.choice(VALUES)


def _change_safetensors(path: Path, rng: random.Random) -> None:
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if "header" in metadata and rng.random() < 0.6:
        metadata["header"] = json.dumps(_changed(json.loads(metadata["header"]), rng))
    else:
        tensors = _changed_tensors(tensors, rng)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata)


def _change_torch(path: Path, rng: random.Random) -> None:
    content = torch.load(path, weights_only=False)
    inner = [key for key, value in content.items() if isinstance(value, dict)]
    if inner and rng.random() < 0.7:
        key = rng.choice(inner)
        content[key] = _changed_tensors(content[key], rng)
    else:
        content = _changed_tensors(content, rng)
    torch.save(content, path)


def _changed_tensors(tensors: dict, rng: random.Random) -> dict:
    name = rng.choice(list(tensors))
    value, others = tensors[name], {key: item for key, item in tensors.items() if key != name}
    if not isinstance(value, torch.Tensor):
        return others | {name: rng.choice(VALUES)}
    match rng.randrange(6):
        case 0:
            return others
        case 1:
            return others | {f"{name}_": value}
        case 2:
            return others | {name: value.to(rng.choice(DTYPES))}
        case 3:
            return others | {name: value.flatten()}
        case 4:
            return others | {name: value[:0] if value.ndim else value[None]}
        case _:
            return others | {
                name: torch.full_like(value, rng.choice((float("nan"), 1e30)) if value.is_floating_point() else 0)
            }


def _change_arrays(path: Path, rng: random.Random) -> None:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    for key, value in _array_variant(name, array, rng).items():
        arrays[key] = value
    np.savez(path, **arrays)


def _change_array(path: Path, rng: random.Random) -> None:
    np.save(path, _array_variant("a", np.load(path, allow_pickle=False), rng).get("a", np.zeros(0)))


def _array_variant(name: str, array: np.ndarray, rng: random.Random) -> dict[str, np.ndarray]:
    variants: tuple[Callable[[], dict[str, np.ndarray]], ...] = (
        dict,
        lambda: {f"{name}_": array},
        lambda: {name: array.astype(rng.choice(("f2", "f8", "i8", "u2", "?", "c8", "U5")))},
        lambda: {name: array.reshape(-1)},
        lambda: {name: array[None]},
        lambda: {name: array[:0] if array.ndim else array},
        lambda: {name: array[..., :1] if array.ndim else array},
        lambda: {name: np.full_like(array, 200) if array.dtype == np.uint8 else np.full(array.shape, np.nan)},
        lambda: {name: -array},
    )
    return rng.choice(variants)()


def _change_archive(path: Path, rng: random.Random) -> None:
    """A zip file without one of its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.pop(rng.choice(list(members)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    ".json": _change_json,
    ".jsonl": _change_lines,
    ".txt": _change_text,
    ".safetensors": _change_safetensors,
    ".pth": lambda path, rng: (_change_torch if rng.random() < 0.8 else _change_archive)(path, rng),
    ".npz": _change_arrays,
    ".npy": _change_array,
}
DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "bytes": _bytes,
    "values": _values,
    "empty": _empty,
    "remove": _remove,
    "swap": _swap,
    "loop": _loop,
    "forbid": _forbid,
    "other": _other,
    "odd_neighbor": _odd_neighbor,
}
