"""Results as JSON files. A score is not lost when the same checkpoint is scored again with other settings."""

from pathlib import Path
from typing import Any

from options import UsageError, as_json
from runtime.files import move_aside, read_json, write_json
from runtime.messages import note
from runtime.outputs import record_failure

__all__ = ["write_result"]

SCORES = ("value", "bits_per_dimension")  # entries of results that may have taken long
SETTINGS = (
    "samples", "images", "precision", "weights_sha256", "autoencoder_sha256", "solver", "guidance", "generator", "label_rule",
    "use_labels", "completions", "metric", "image_format", "features_sha256", "feature_precision", "trace",
)  # fmt: skip


def write_result(chosen: str, default: Path, result: dict[str, Any]) -> None:
    """Write a result to the file `chosen`, or to `default` if that is empty. There, a score with other settings is kept.

    The older file gets another name, and a note says which. A failure is recorded in the result (`record_failure`).
    """
    with record_failure(result):
        if not chosen and (changed := _changed_settings(default, as_json(result))):
            note(f"{default} held a score with other settings ({'; '.join(changed)}): it is now {move_aside(default)}")
        write_json(chosen or default, result)


def _changed_settings(path: Path, result: dict[str, Any]) -> list[str]:
    """Descriptions of the settings that differ from the score's in `path`; none without a score there."""
    try:
        before = read_json(path)
    except UsageError:
        return []
    if not any(name in before for name in SCORES):
        return []
    return [
        f"{name} was {before[name]}, now {result.get(name, 'none')}"
        for name in SETTINGS
        if name in before and before[name] != result.get(name)
    ]
