#!/usr/bin/env python
"""Fréchet distance of two image sets: fid_score.py GENERATED REAL, each a folder or a statistics file (.npz, .npy)."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.features import FeatureNetwork, FeatureOptions, load_features
from evaluation.metrics import frechet_distance
from evaluation.statistics import Statistics, folder_statistics, load_statistics
from options import Options, UsageError, exit_cleanly, option, parse_options
from runtime.precision import DeviceOptions, choose_device


@dataclass(frozen=True)
class ScoreOptions:
    """Scoring."""

    batch_size: int = option(50, "images at a time", minimum=1)


def main() -> None:
    """Take the two paths, before or after the flags, and print their distance."""
    paths, flags = _split_paths(sys.argv[1:])
    options = parse_options(str(__doc__), [ScoreOptions, FeatureOptions, DeviceOptions], flags)
    known = {path: load_statistics(path) for path in paths if not Path(path).is_dir()}
    features = None
    if len(known) < len(set(paths)):
        features = _choose_features(list(known.values()), options)
    sets = []
    for path in paths:
        if path not in known:
            assert features is not None
            known[path] = folder_statistics(path, features, options[ScoreOptions].batch_size)
        sets.append(known[path])
    recorded = next((s.meta["features"]["label"] for s in sets if "features" in s.meta), "Frechet distance")
    print(f"{recorded}: {frechet_distance(*sets):.6g}")


def _split_paths(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "-h" in arguments or "--help" in arguments:
        return [], ["--help"]
    first = bool(arguments) and not arguments[0].startswith("-")
    paths, flags = (arguments[:2], arguments[2:]) if first else (arguments[-2:], arguments[:-2])
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError("expected two paths, GENERATED and REAL, each a folder of images or a .npz or .npy file")
    return paths, flags


def _choose_features(known: list[Statistics], options: Options) -> FeatureNetwork:
    """Those asked for, else those of the statistics file, else Inception."""
    recorded = [s.meta["features"]["name"] for s in known if "features" in s.meta]
    asked = options[FeatureOptions]
    name = asked.features or next(iter(recorded), "inception")
    return load_features(name, asked.feature_weights, choose_device(options[DeviceOptions]))


if __name__ == "__main__":
    exit_cleanly(main)
