"""From options to a `Sampler`: find the checkpoint, rebuild what it describes, refuse flags that contradict it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.experiments import experiment_folder, find_checkpoint, newest_model
from checkpoints.files import LoadedModel, load_model
from checkpoints.header import Header
from checkpoints.lfm import open_published
from checkpoints.tasks import GENERATE, TASKS, Task
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from flow.guidance import GuidanceOptions
from flow.solvers import SOLVERS, SolverOptions, check_method, needs_float32
from models.autoencoders.loading import AutoencoderOptions
from models.autoencoders.protocol import AutoencoderFacts
from models.registry import NetworkOptions
from options import Options, UsageError, as_json, option
from runtime.distributed import Processes
from runtime.inference import for_sampling
from runtime.precision import MachineOptions, choose_device, choose_machine
from runtime.torch_files import is_torch_file
from sampling.noise import NOISE_SOURCES
from sampling.sampler import Sampler, check_guidance

__all__ = ["Opened", "SourceOptions", "open_sampler"]


ADAPTIVE_CALLS = 100  # of the network, about, for a batch
OF_FIXED_STEPS = {"num_steps", "step_size", "time_grid", "time_shift", "grid_location", "grid_scale", "grid_rho"}


@dataclass(frozen=True)
class SourceOptions:
    """What to sample from."""

    checkpoint: str = option(
        "", "checkpoint, ours or a published .pth; default: the newest of the experiment", flags=("--model_ckpt",)
    )
    exp: str = option("experiment", "name of the experiment")
    save_root: str = option("saved_info", "folder of all experiments")
    epoch_id: int | None = option(None, "epoch of the experiment's checkpoint; default: the newest")
    guide_checkpoint: str = option(
        "", "autoguidance: checkpoint of a weaker network, which --cfg_scale leads away from in the null class's place"
    )
    seed: int = option(42, "seed of the noise; sample i depends on (seed, i) alone", minimum=0)
    generator: str = option(
        "determ-indiv",
        "source of the noise: a stream per sample (determ, determ-indiv), or torch's global generator (dummy)",
        choices=tuple(NOISE_SOURCES),
    )


class Opened(NamedTuple):
    """A sampler, the path and header of its checkpoint, and all that its samples depend on beside their labels."""

    sampler: Sampler
    path: Path
    header: Header
    settings: dict[str, Any]

    @property
    def stem(self) -> str:
        """The name of what is written, without suffix."""
        solver, scale = self.sampler.solver, self.sampler.guidance.cfg_scale
        steps = "" if SOLVERS[solver.method].adaptive else f"_{solver.steps}steps"
        return f"{self.path.stem}_{solver.method}{steps}_cfg{scale:g}_seed{self.sampler.seed}"

    def result(self) -> dict[str, Any]:
        """What a result says first: the checkpoint and how it was used."""
        return {"checkpoint": str(self.path), "step": self.header.step, **self.settings}

    @property
    def task(self) -> Task:
        """What the network was trained for."""
        return TASKS[self.header.task]

    def real_images(self, data: DatasetOptions, split: Split) -> ImageDataset:
        """A split of the dataset that the network was trained on."""
        stored = self.header.dataset
        return open_dataset(replace(data, dataset=stored.name, image_size=stored.image_size), split)


def open_sampler(
    options: Options,
    processes: Processes = Processes(),  # noqa: B008
    tasks: Sequence[Task] = (GENERATE,),
    batches: float = 0,
) -> Opened:
    """The sampler that the options describe, of a network for one of `tasks`; experiments are looked for in the first's.

    `batches`, about as many as each process will draw, decides whether compiling the network pays.

    Raises:
        UsageError: no such checkpoint, one for another task, flags that contradict it, or a guide of another kind.
    """
    source, solver, guidance = options[SourceOptions], options[SolverOptions], options[GuidanceOptions]
    check_method(solver)
    device = choose_device(options[MachineOptions], processes)
    path = _checkpoint_path(source, options[DatasetOptions].dataset, tasks[0])
    with processes.main_first():  # the others find the autoencoder that it may have downloaded
        model = _open_model(path, options, device, tasks[0])
        guide = _open_guide(options, model, device)
    header = model.header
    task = TASKS[header.task]
    if task not in tasks:
        raise UsageError(f"{path} was trained for {task.purpose}: use test_flow_latent{task.script}.py")
    own_way = task is not tasks[0]  # of using the network, whatever the solver
    _note_unused_flags(options, solver, own_way)
    precise = needs_float32(solver) and not own_way
    machine = choose_machine(options[MachineOptions], processes, precise).settled(batches * _calls(solver), processes)
    print(machine.describe())
    sampler = Sampler(
        network=for_sampling(model.network, machine),
        autoencoder=model.autoencoder,
        facts=header.dataset,
        latent_shape=header.latent_shape,
        num_classes=header.num_classes,
        solver=solver,
        machine=machine,
        seed=source.seed,
        guidance=guidance,
        guide=for_sampling(guide.network, machine) if guide else None,
        generator=source.generator,
        drops_labels=header.drops_labels,
        drops_dense=header.drops_dense,
    )
    settings = {
        "weights_sha256": header.weights_sha256,
        "network": {"model_type": header.model_type, **as_json(header.network)},
        "autoencoder": as_json(header.autoencoder),
        "guide_sha256": guide.header.weights_sha256 if guide else None,
        "seed": source.seed,
        "generator": source.generator,
        "solver": as_json(solver),
        "guidance": as_json(guidance),
        "precision": machine.precision,
        "compiled": machine.compile,
    }
    return Opened(sampler, path, header, settings)


def _open_model(path: Path, options: Options, device: torch.device, task: Task) -> LoadedModel:
    """The model of a checkpoint, which the flags must fit, or of a published file, which they describe."""
    if is_torch_file(path):
        given = {name: options.values[name] for name in options.explicit}
        return open_published(path, given, device, downstream=task is not GENERATE)
    model = load_model(path, device, _moved_autoencoder(options))
    data_of_its_own = {"dataset"} if task is not GENERATE else set()
    _refuse_contradictions(options, model.header, path, data_of_its_own)
    return model


def _moved_autoencoder(options: Options) -> AutoencoderOptions | None:
    """Where the autoencoder lies now, if the user says so."""
    return options[AutoencoderOptions] if "pretrained_autoencoder_ckpt" in options.explicit else None


def _open_guide(options: Options, model: LoadedModel, device: torch.device) -> LoadedModel | None:
    """The weaker network of autoguidance, if one was named; else the scale must suit the network itself."""
    source, scale = options[SourceOptions], options[GuidanceOptions].cfg_scale
    if not source.guide_checkpoint:
        check_guidance(model.header.network.label_dropout, model.header.dense, scale)
        return None
    if scale == 1:
        raise UsageError("--guide_checkpoint has no effect at --cfg_scale 1: give a scale above 1")
    guide = load_model(source.guide_checkpoint, device, _moved_autoencoder(options))
    for name in ("task", "latent_size", "latent_channels", "num_classes"):
        theirs, ours = getattr(guide.header, name), getattr(model.header, name)
        if theirs != ours:
            raise UsageError(
                f"--guide_checkpoint {source.guide_checkpoint}: its {name} is {theirs}, "
                f"but that of the network to guide is {ours}"
            )
    if guide.header.autoencoder.sha256 != model.header.autoencoder.sha256:
        raise UsageError(
            f"--guide_checkpoint {source.guide_checkpoint}: it was trained on another autoencoder's latents"
        )
    return guide


def _note_unused_flags(options: Options, solver: SolverOptions, own_way: bool) -> None:
    if own_way or not SOLVERS[solver.method].adaptive:
        return
    if unused := sorted(OF_FIXED_STEPS & options.explicit):
        flags = ", ".join(f"--{name}" for name in unused)
        print(f"note: {flags} has no effect on the adaptive solver {solver.method}, which follows --atol and --rtol")


def _calls(solver: SolverOptions) -> int:
    """Of the network, for a batch; at least so many, since some methods make several in a step."""
    return ADAPTIVE_CALLS if SOLVERS[solver.method].adaptive else solver.steps


def _checkpoint_path(source: SourceOptions, dataset: str, task: Task) -> Path:
    folder = experiment_folder(source.save_root, dataset, source.exp, task.runs)
    if source.checkpoint:
        return find_checkpoint(source.checkpoint, folder)
    return newest_model(folder, source.epoch_id)


def _refuse_contradictions(options: Options, header: Header, path: Path, free: set[str]) -> None:
    """An explicitly given flag, but for the `free` ones, must say what the checkpoint says."""
    image_size = header.dataset.image_size
    stored = {"dataset": header.dataset.name, "image_size": image_size, **as_json(header.network)}
    stored |= {"f": image_size // header.latent_size, "scale_factor": _scale_factor(header.autoencoder)}
    given = {name: as_json(options.values[name]) for name in options.explicit - free if name in stored}
    if "model_type" in options.explicit or options[NetworkOptions].use_origin_adm:
        stored["model_type"], given["model_type"] = header.model_type, options[NetworkOptions].resolve()
    for name, value in given.items():
        if value != stored[name]:
            raise UsageError(
                f"--{name} {value} contradicts the checkpoint {path}, which says {stored[name]}: "
                "leave the flag out, or choose another checkpoint"
            )


def _scale_factor(autoencoder: AutoencoderFacts) -> float | None:
    """The factor that an autoencoder's statistics amount to; None where one number does not tell."""
    means, stds = autoencoder.latents_mean, autoencoder.latents_std
    return round(1 / stds[0], 6) if not any(means) and len(set(stds)) == 1 else None
