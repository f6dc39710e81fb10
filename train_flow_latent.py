#!/usr/bin/env python
"""Train latent flow matching (LFM, arXiv:2307.08698): unconditional or class-conditional generation."""

from models.registry import IGNORED_NETWORK_FLAGS
from options import INTERRUPTED, Options
from runtime.distributed import Processes
from runtime.launch import run_script
from training.loop import train
from training.setup import TRAINING_GROUPS, prepare

# Published flags without an effect, here or there.
IGNORED = {
    **IGNORED_NETWORK_FLAGS,
    "beta1": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
    "beta2": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
}


def main(options: Options, processes: Processes) -> int:
    """Train, and say how to go on."""
    print(options.describe("those that differ from the defaults; all: config.json in the run's folder"))
    job, resume = prepare(options, processes)
    parameters = sum(p.numel() for p in job.network.parameters())
    print(f"{job.header['model_type']}, {parameters / 1e6:.1f} M parameters, {len(job.source)} images; {job.folder}")
    complete = train(job, resume)
    next_step = (
        "complete; sample with test_flow_latent.py"
        if complete
        else "interrupted; the same command (without --overwrite) continues it"
    )
    print(f"{job.folder}: {next_step}")
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    run_script(main, str(__doc__), TRAINING_GROUPS, ignored=IGNORED)
