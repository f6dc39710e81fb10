#!/usr/bin/env python
"""Sample from a trained velocity network and score the samples. The checkpoint describes the network."""

from exits import guarded_imports

with guarded_imports():
    from checkpoints.tasks import GENERATE
    from runtime.processes.launch import run_script
    from sampling.request import IGNORED_SAMPLING_FLAGS, checkpoint_groups
    from sampling.script import mode_groups, run

if __name__ == "__main__":
    run_script(
        run,
        str(__doc__),
        mode_groups(),
        ignored=IGNORED_SAMPLING_FLAGS,
        task=GENERATE.name,
        rare=checkpoint_groups(),
    )
