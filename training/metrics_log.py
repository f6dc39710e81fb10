"""The record of a run: metrics.jsonl and TensorBoard events, cut back to the step that a resumed run starts from."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from runtime.files import atomic_path

__all__ = ["Journal"]


class Journal:
    """Appends one JSON object a line; entries beyond `step` (of an interrupted continuation) are dropped at the start."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line, step)]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` of one kind ("train", "validation", "skipped", "spike") at a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def past(self, kind: str, name: str) -> list[float]:
        """The values of one name in all entries of a kind so far."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [entry[name] for entry in entries if entry["kind"] == kind and name in entry]

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


def _step_of(line: str, limit: int) -> bool:
    try:
        return json.loads(line)["step"] <= limit
    except (ValueError, KeyError, TypeError):
        return False  # torn by a crash
