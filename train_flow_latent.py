#!/usr/bin/env python
"""Train latent flow matching (LFM, arXiv:2307.08698): unconditional or class-conditional generation."""

from models.registry import IGNORED_NETWORK_FLAGS
from options import INTERRUPTED, exit_cleanly, parse_options
from runtime.distributed import start_processes
from training.loop import train
from training.setup import TRAINING_GROUPS, prepare

# Published flags without an effect, here or there.
IGNORED = {
    **IGNORED_NETWORK_FLAGS,
    "beta1": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
    "beta2": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
    "num_proc_node": "start several processes with torchrun --nnodes",
    "num_process_per_node": "start several processes with torchrun --nproc_per_node",
    "node_rank": "torchrun tells each process its rank",
    "local_rank": "torchrun tells each process its rank",
    "master_address": "torchrun has --master_addr",
    "master_port": "torchrun has --master_port",
}


def main() -> int:
    """Parse the flags, train, and say how to go on."""
    options = parse_options(str(__doc__), TRAINING_GROUPS, ignored=IGNORED)
    processes = start_processes()
    try:
        if processes.is_main:
            print(options.describe("those that differ from the defaults; all: config.json in the run's folder"))
        job, resume = prepare(options, processes)
        if processes.is_main:
            parameters = sum(p.numel() for p in job.network.parameters())
            print(
                f"{job.header['model_type']}, {parameters / 1e6:.1f} M parameters, {len(job.source)} images; {job.folder}"
            )
        complete = train(job, resume)
        if processes.is_main:
            next_step = (
                "complete; sample with test_flow_latent.py"
                if complete
                else "interrupted; the same command (without --overwrite) continues it"
            )
            print(f"{job.folder}: {next_step}")
        return 0 if complete else INTERRUPTED
    finally:
        processes.stop()


if __name__ == "__main__":
    exit_cleanly(main)
