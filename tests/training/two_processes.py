"""Script that test_parallel.py runs in two processes with a launcher: `python two_processes.py FOLDER [compiled]`."""

import copy
import dataclasses
import importlib.util
import signal
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evaluation.statistics import RunningMoments  # noqa: E402
from flow.auxiliary.losses import AuxiliaryOptions  # noqa: E402
from flow.auxiliary.objective import auxiliary_names  # noqa: E402
from flow.objectives import OBJECTIVES, FlowMatching, Times  # noqa: E402
from flow.paths import PathOptions  # noqa: E402
from models.conditions import Condition  # noqa: E402
from runtime.distributed import join_processes  # noqa: E402
from runtime.processes.parallel import replicate, shard  # noqa: E402
from sampling.sampler import GeneratedBatch, first_images  # noqa: E402
from sampling.writer import SampleWriter  # noqa: E402
from training.auxiliary.setup import add_auxiliary  # noqa: E402
from training.data import Batch, StepStreams  # noqa: E402
from training.loop import train  # noqa: E402
from training.optimizers import OptimizerOptions  # noqa: E402
from training.state import TrainingState  # noqa: E402


def module_of(path):
    """Import a module by path, because an installed package is also named `tests`."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


runs = module_of(Path(__file__).with_name("test_loop.py"))
small_networks = module_of(ROOT / "tests" / "small_networks.py")

OBJECTIVE = FlowMatching(PathOptions(sigma_min=1e-5))
AVERAGES = {"posthoc_ema": (0.05, 0.1), "posthoc_ema_every": 5}  # snapshots at steps 5, 10 and 14
RATE = 1e-4  # small, since Adam changes a weight by this much even if its gradient is only rounding error


def interrupted(folder, **settings):
    """Signal one process, check that both stop, and resume the run."""
    stop = (3, runs.send_signal(signal.SIGTERM)) if settings["processes"].rank else None
    assert not train(runs.new_run(folder, event=stop, lr=RATE, **AVERAGES, **settings), resume=False)
    settings["processes"].barrier()
    assert train(runs.new_run(folder, lr=RATE, **AVERAGES, **settings), resume=True)


def by_the_clock(folder, processes):
    """Only the second process's clock asks for validations, grids and checkpoints; both must take part in them."""
    minutes = 1e-9 if processes.rank else 1e9
    names = ("eval_every_minutes", "plot_every_minutes", "save_ckpt_every_minutes")
    run = runs.new_run(folder / "by the clock", processes=processes, lr=RATE, experiment=dict.fromkeys(names, minutes))
    assert train(run, resume=False)


def training(folder, processes):
    for name, settings in {
        "first step": {"max_steps": 1},
        "first step, accumulated": {"max_steps": 1, "grad_accumulation": 2},
        "first step, sharded": {"max_steps": 1, "fsdp": True, "grad_accumulation": 2},
        "replicated": {},
        "sharded": {"fsdp": True},
        "first step, augmented": {"max_steps": 1},
        "first step, contrasted": {"max_steps": 1, "path": runs.CONTRASTED},
    }.items():
        new_run = runs.new_augmented_run if name == "first step, augmented" else runs.new_run
        assert train(new_run(folder / name, processes=processes, lr=RATE, **AVERAGES, **settings), resume=False)
    for name in ("replicated", "sharded"):
        interrupted(folder / f"{name}, interrupted", processes=processes, fsdp=name == "sharded")
    # "begun alone" was started in one process and is resumed in two. "begun sharded" is resumed by test_parallel.py.
    assert train(runs.new_run(folder / "begun alone", processes=processes, fsdp=True, lr=RATE, **AVERAGES), resume=True)
    stop = (3, runs.send_signal(signal.SIGTERM))
    run = runs.new_run(folder / "begun sharded", event=stop, processes=processes, fsdp=True, lr=RATE, **AVERAGES)
    assert not train(run, resume=False)


def skipped_step(folder, processes):
    """A gradient that is not finite in one process makes all processes skip the step, replicated or sharded."""
    for fsdp in (False, True):
        run = runs.new_run(folder, processes=processes, fsdp=fsdp)
        place = partial(shard, device=torch.device("cpu"), processes=processes) if fsdp else None
        state = TrainingState(run.network, runs.MACHINE, 0.9, OptimizerOptions(weight_decay=0.01), place)
        velocity = run.network if fsdp else replicate(run.network, processes)
        times, labels = Times(torch.full((4,), 0.5)), torch.zeros(4, dtype=torch.long)
        good = Batch(*torch.ones(2, 4, 1, 4, 4), times, Condition(labels))
        bad = good._replace(noise=good.noise * (float("nan") if processes.rank else 1))
        state.advance(velocity, OBJECTIVE, good, 1e-2, 1.0)
        before = tensors_of(state.content(processes))
        state.advance(velocity, OBJECTIVE, bad, 1e-2, 1.0)
        assert state.sums.tolist()[2:] == [1.0, 2.0]
        after = tensors_of(state.content(processes))
        assert len(before) > 50
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def every_family(processes):
    """Steps with half a batch per process equal one process's step with the whole batch, for every family of networks."""
    torch.manual_seed(0)
    data, noise = torch.randn(2, 4, 3, 8, 8)
    batch = Batch(data, noise, Times(torch.rand(4)), Condition(torch.arange(4) % 2))
    variants = [("DiT-Mi/2", options) for options in small_networks.DIT_VARIANTS]
    for model_type, options in [*small_networks.SMALL.items(), *variants]:
        compare_steps(processes, model_type, options, OBJECTIVE, batch)
    parameters = torch.rand(4, 3) * torch.tensor([[0.0], [0.0], [1.0], [1.0]])  # the first process has none but zeros
    augmented = batch._replace(condition=batch.condition._replace(augmentation=parameters))
    options = dataclasses.replace(small_networks.SMALL["DiT-Mi/2"], augment=("color",))
    compare_steps(processes, "DiT-Mi/2", options, OBJECTIVE, augmented)


def auxiliary_losses(processes):
    """The same with auxiliary heads and routing: while all losses count, after some have ended, and in every variant of DiT."""
    heads = {
        "auxiliary_velocity": 0.5,
        "align_latents": 1.0,
        "align_features": 0.5,
        "align_width": 5,
        "align_hidden": 8,
    }
    routing = {"tap_block": 2, "route_blocks": (2, 4), "route_rate": 0.5}
    data, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, *variants = small_networks.SMALL["DiT-Mi/2"], *small_networks.DIT_VARIANTS
    for blocks, step in [(plain, 0), (plain, 5), *((variant, 0) for variant in variants)]:
        options = dataclasses.replace(blocks, **heads, **routing)
        objective = add_auxiliary(OBJECTIVE, options, AuxiliaryOptions(auxiliary_until=3))
        draws = objective.draw(StepStreams(0, step, 4, (3, 8, 8), torch.device("cpu")))
        side = 2 if blocks.fine_blocks else 4
        draws = draws._replace(features=torch.randn(4, 5, side, side, generator=torch.Generator().manual_seed(1)))
        batch = Batch(data, noise, draws, Condition(torch.arange(4) % 2))
        compare_steps(processes, "DiT-Mi/2", options, objective, batch)


# Two few-step objectives use each part of a step: the derivative of the bare network, which cannot be sharded, and the EMA.
# Guided targets evaluate the wrapped network without gradients. Values are options of the network, and the mode.
FEW_STEPS = {
    "decoupled_mean_flow": ({"until_embedding": "decoupled", "log_variance_head": True}, "replicated"),
    "shortcut": ({"until_embedding": "interval"}, "sharded"),
}


def few_step_objectives(processes):
    """The same with objectives that evaluate the network several times, and differentiate it, in a step."""
    data, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, null = torch.arange(4) % 2, torch.full((4,), 2)
    for name, (network, mode) in FEW_STEPS.items():
        family = OBJECTIVES[name]
        objective = family.build(family.options(flow_share=0.0, target_kappa=0.5))
        draws = objective.draw(StepStreams(0, 5, 4, (3, 8, 8), torch.device("cpu"), last_step=10))
        draws = draws._replace(kept=torch.arange(4) > 0, null=Condition(null))
        options = dataclasses.replace(small_networks.SMALL["DiT-Mi/2"], **network)
        batch = Batch(data, noise, draws, Condition(labels))
        compare_steps(processes, "DiT-Mi/2", options, objective, batch, (mode,))


def compare_steps(processes, model_type, options, objective, batch, modes=("replicated", "sharded")):
    part, contents = batch.split(2)[processes.rank], []
    for mode in ("alone", *modes):
        network = small_networks.new_network(model_type, options).requires_grad_(True)
        place = partial(shard, device=torch.device("cpu"), processes=processes) if mode == "sharded" else None
        names = auxiliary_names(objective)
        state = TrainingState(network, runs.MACHINE, 0.9, OptimizerOptions(), place, auxiliary=names)
        velocity = replicate(network, processes) if mode == "replicated" else network
        for _ in range(2):  # an unused weight would be an error in the second step
            state.advance(velocity, objective, batch if mode == "alone" else part, RATE, 0.0)
            contents.append(copy.deepcopy(state.content(processes)))  # which refers to the state's tensors
    if processes.is_main:
        assert_same_step(*contents[::2], model_type=model_type)
        alone, *others = contents[1::2]
        for other in others:
            torch.testing.assert_close(other["sums"].mean(0), alone["sums"][0], rtol=1e-4, atol=1e-5)


def assert_same_step(alone, *others, model_type):
    """Compare gradients and weights after one step.

    Adam's exp_avg is a tenth of the gradient. Adam's first step changes every weight by the learning rate; where the gradient
    is 0, the sign is arbitrary, so a few weights may differ.
    """
    optimizer_state = alone["optimizers"][0]["state"]
    assert max(values["exp_avg"].abs().max() for values in optimizer_state.values()) > 1e-4
    for other in others:
        for number, values in optimizer_state.items():
            expected, found = values["exp_avg"], other["optimizers"][0]["state"][number]["exp_avg"]
            assert (found - expected).abs().max() <= 1e-5 * max(1e-2, expected.abs().max()), (model_type, number)
        differences = [(other["network"][name] - value).abs().flatten() for name, value in alone["network"].items()]
        assert (torch.cat(differences) < RATE / 10).float().mean() > 0.99, model_type


def tensors_of(content):
    """Copies of the weights, the EMA and the optimizer state."""
    weights = [*content["network"].values(), *content["ema"]["weights"].values()]
    optimizer_state = [value for values in content["optimizers"][0]["state"].values() for value in values.values()]
    return [value.clone() for value in [content["ema"]["updates"], *weights, *optimizer_state]]


def exchange(processes):
    rank = processes.rank
    assert processes.gather(f"from {rank}") == (["from 0", "from 1"] if processes.is_main else [])
    assert processes.from_main(rank) == 0
    assert processes.share(range(5)) == range(rank, 5, 2)
    assert processes.sum(torch.tensor([1, rank])).tolist() == [2, 1]
    assert processes.mean(torch.tensor([float(rank)])).tolist() == [0.5]
    assert processes.any(rank == 1)
    assert not processes.any(False)


def samples(folder, processes):
    """Write five batches of two samples, an uneven number for two processes."""
    ones = torch.ones(2, dtype=torch.long)
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    every = [
        GeneratedBatch(range(i, i + 2), images[i : i + 2], torch.arange(2), evaluations=ones, network_evaluations=ones)
        for i in range(0, 10, 2)
    ]
    for kind in ("npz", "png"):
        writer = SampleWriter(folder / kind, kind, {}, processes)
        for batch in processes.share(every):
            writer.add(batch)
        writer.close()
    first = first_images(processes.share(every), 7, processes)
    assert first.flatten().tolist() == (list(range(7)) if processes.is_main else [])

    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    own, alone = RunningMoments(3), RunningMoments(3)
    alone.update(rows)
    own.update(rows[4:] if processes.rank else rows[:4])
    together = RunningMoments(3)
    for share in processes.gather(own.triple()):
        together.merge(RunningMoments.of(*share))
    if processes.is_main:
        assert together.count == 9
        assert abs(together.covariance - alone.covariance).max() < 1e-14


def compiled(folder, processes):
    run = runs.new_run(folder / "first step, compiled", processes=processes, lr=RATE, max_steps=1)
    assert train(dataclasses.replace(run, machine=dataclasses.replace(run.machine, compile=True)), resume=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def main(folder):
    torch.set_num_threads(1)
    with join_processes() as processes:
        assert (processes.count, processes.local_count) == (2, 2)
        if sys.argv[2:] == ["compiled"]:
            compiled(folder, processes)
        else:
            exchange(processes)
            skipped_step(folder / "skipped", processes)
            every_family(processes)
            auxiliary_losses(processes)
            few_step_objectives(processes)
            samples(folder / "samples", processes)
            training(folder, processes)
            by_the_clock(folder, processes)
        print("all is well")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
