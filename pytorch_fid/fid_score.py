#!/usr/bin/env python
"""Score the image set GENERATED against the image set REAL.

Both are required positional arguments, before or after the flags. Each is a folder of images, an .npz file of images, an LMDB,
or a file of statistics (.npz, .npy). REAL may also be the name of a dataset. See docs/scoring.md.

Example: python pytorch_fid/fid_score.py samples/ ffhq_256 --datadir data --image_size 256 --metrics fid kid
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exits import exit_cleanly, guarded_imports

with guarded_imports():
    from command_line import parse_options
    from evaluation.comparison import ComparisonOptions, compare, split_paths
    from evaluation.features.registry import FeatureOptions
    from evaluation.score import ScoreOptions, result_line
    from runtime.files import write_json
    from runtime.messages import show_result
    from runtime.outputs import check_file
    from runtime.precision import DeviceOptions, choose_device


def main() -> None:
    """Score the two image sets and print the result."""
    paths, flags = split_paths(sys.argv[1:])
    groups = [ComparisonOptions, ScoreOptions, FeatureOptions, DeviceOptions]
    options = parse_options(str(__doc__), groups, flags, positional="GENERATED REAL")
    comparison, device = options[ComparisonOptions], choose_device(options[DeviceOptions])
    check_file(comparison.output_json, "--output_json")
    result = compare(*paths, comparison, options[ScoreOptions], options[FeatureOptions], device)
    show_result(result_line(result), result["warnings"])
    if comparison.output_json:
        write_json(comparison.output_json, result)


if __name__ == "__main__":
    exit_cleanly(main)
