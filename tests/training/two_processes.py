"""What test_parallel.py runs in each of two processes: `python two_processes.py FOLDER`, started by a launcher."""

import importlib.util
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runtime.distributed import join_processes  # noqa: E402
from training.loop import train  # noqa: E402

specification = importlib.util.spec_from_file_location("test_loop", Path(__file__).with_name("test_loop.py"))
runs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(runs)


def interrupted(folder, **settings):
    """Both processes stop together although one alone is asked to; then the run goes on."""
    stop = (3, runs.signalled(signal.SIGTERM)) if settings["processes"].rank else None
    assert not train(runs.new_job(folder, event=stop, **settings), resume=False)
    settings["processes"].barrier()
    assert train(runs.new_job(folder, **settings), resume=True)


def main(folder):
    torch.set_num_threads(1)
    with join_processes() as processes:
        assert processes.count == 2
        for name, training in {
            "replicated": {},
            "replicated, in parts": {"grad_accumulation": 2},
            "shared out": {"fsdp": True},
            "shared out, in parts": {"fsdp": True, "grad_accumulation": 2},
        }.items():
            assert train(runs.new_job(folder / name, processes=processes, **training), resume=False)
            print(name)
        for name in ("replicated", "shared out"):
            interrupted(folder / f"{name}, interrupted", processes=processes, fsdp=name == "shared out")
        # Started in one process, continued in two, and the other way round.
        assert train(runs.new_job(folder / "begun alone", processes=processes, fsdp=True), resume=True)
        stop = (3, runs.signalled(signal.SIGTERM))
        job = runs.new_job(folder / "begun shared out", event=stop, processes=processes, fsdp=True)
        assert not train(job, resume=False)
        values = processes.gather(processes.rank), processes.share(range(5)), processes.from_main(processes.rank)
        assert values == ([0, 1] if processes.is_main else [], range(processes.rank, 5, 2), 0)
        assert processes.sum(torch.tensor([1, processes.rank])).tolist() == [2, 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
