#!/usr/bin/env python
"""Score the inpainted images in the folder INPAINTED against the folder ORIGINALS.

Both folders are required positional arguments, before or after the flags. Images are paired by file name. The script prints
FID, P-IDS, U-IDS, PSNR, SSIM and, with --lpips, LPIPS. See docs/scoring.md.

Example: python pytorch_fid/cal_inpainting.py samples/completions samples/originals --lpips
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exits import exit_cleanly, guarded_imports

with guarded_imports():
    from command_line import parse_options
    from evaluation.comparison import ComparisonOptions, split_paths
    from evaluation.features.registry import FeatureOptions
    from evaluation.pair_comparison import PairOptions, compare_pairs
    from evaluation.score import ScoreOptions, result_line
    from runtime.files import write_json
    from runtime.messages import show_result
    from runtime.outputs import check_file
    from runtime.precision import DeviceOptions, choose_device


def main() -> None:
    """Score the two folders and print the result."""
    paths, flags = split_paths(sys.argv[1:])
    groups = [PairOptions, ComparisonOptions, ScoreOptions, FeatureOptions, DeviceOptions]
    options = parse_options(str(__doc__), groups, flags, positional="INPAINTED ORIGINALS")
    comparison = options[ComparisonOptions]
    check_file(comparison.output_json, "--output_json")
    result = compare_pairs(
        *paths,
        comparison=comparison,
        scoring=options[ScoreOptions],
        pairing=options[PairOptions],
        features=options[FeatureOptions],
        device=choose_device(options[DeviceOptions]),
    )
    show_result(result_line(result), result["warnings"])
    if comparison.output_json:
        write_json(comparison.output_json, result)


if __name__ == "__main__":
    exit_cleanly(main)
