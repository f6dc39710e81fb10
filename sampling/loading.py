"""Loading of a sampler: finds the checkpoint, builds its network, and rejects flags that contradict its header."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.experiments import experiment_folder, find_checkpoint, newest_model
from checkpoints.files import LoadedModel, describes_network, load_model
from checkpoints.header import Header
from checkpoints.projects.opening import open_published
from checkpoints.tasks import GENERATE, TASKS, Task
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from flow.guidance import GuidanceOptions, VelocityNetwork
from flow.losses.contrast import correct
from flow.objectives import OBJECTIVES
from flow.solvers import SOLVERS, SolverOptions, check_method, needs_float32, unreachable_tolerances
from models.autoencoders.loading import AutoencoderOptions
from models.autoencoders.protocol import MEASURED, UNMEASURED, AutoencoderFacts
from models.autoencoders.statistics import describe_scale, read_chosen_scale
from models.registry import NetworkOptions, network_groups
from options import UsageError, as_json
from runtime.distributed import Processes
from runtime.inference import for_sampling
from runtime.messages import fact, note
from runtime.precision import Machine, choose_machine, find_device
from sampling.checks import check_average_velocity, check_guidance, check_network, warn_of_untrained
from sampling.conventions import check_file
from sampling.request import SamplerRequest, note_unused
from sampling.sampler import Sampler

__all__ = ["LoadedSampler", "load_sampler"]

TYPICAL_ADAPTIVE_EVALUATIONS = 100  # network evaluations per batch; decides whether compiling pays off
FIXED_STEP_FLAGS = (
    *("end_time", "fit_grid", "grid_location", "grid_rho", "grid_scale", "last_step"),
    *("num_steps", "step_size", "time_grid", "time_shift"),
)


@dataclass(frozen=True)
class LoadedSampler:
    """A sampler and its origin.

    Args:
        sampler: draws the samples.
        path: its checkpoint.
        header: the checkpoint's header.
        settings: everything that the samples depend on except labels and conditions, in JSON's types.
    """

    sampler: Sampler
    path: Path
    header: Header
    settings: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """File name, without suffix, of results of this checkpoint, solver, guidance scales and seed."""
        solver, guidance = self.sampler.solver, self.sampler.guidance
        steps = "" if SOLVERS[solver.method].adaptive else f"_{solver.steps}steps"
        scales = {"ig": guidance.internal_guidance, "embedded": guidance.embedded_guidance}
        others = "".join(f"_{name}{scale:g}" for name, scale in scales.items() if scale != 1)
        return f"{self.path.stem}_{solver.method}{steps}_cfg{guidance.cfg_scale:g}{others}_seed{self.sampler.seed}"

    @property
    def task(self) -> Task:
        """The task that the network was trained for."""
        return TASKS[self.header.task]

    def output_folder(self, chosen: str = "") -> Path:
        """Folder of pictures and results: `chosen`, or samples/ next to the checkpoint if `chosen` is empty."""
        return Path(chosen) if chosen else self.path.parent / "samples"

    def describe(self) -> dict[str, Any]:
        """The first entries of every result: the checkpoint and the settings."""
        return {"checkpoint": str(self.path), "step": self.header.step, **self.settings}

    def real_images(self, data: DatasetOptions, split: Split) -> ImageDataset:
        """A split of the dataset that the network was trained on, read from `data.datadir`.

        Raises:
            UsageError: the dataset's files are missing.
        """
        stored = self.header.dataset
        return open_dataset(replace(data, dataset=stored.name, image_size=stored.image_size), split)

    def changed(self, solver: SolverOptions | None = None, guidance: GuidanceOptions | None = None) -> "LoadedSampler":
        """The same network with another solver or guidance; None keeps the current one.

        Raises:
            UsageError: the network lacks what they need.
        """
        solver, guidance = solver or self.sampler.solver, guidance or self.sampler.guidance
        check_network(self.header.network, solver, guidance)
        settings = {**self.settings, "solver": as_json(solver), "guidance": as_json(guidance)}
        return replace(self, sampler=replace(self.sampler, solver=solver, guidance=guidance), settings=settings)


def load_sampler(
    request: SamplerRequest,
    processes: Processes = Processes(),  # noqa: B008
    tasks: Sequence[Task] = (GENERATE,),
    batches: float = 0,
) -> LoadedSampler:
    """Load the sampler that a request asks for.

    Args:
        request: checkpoint, solver, guidance and machine.
        processes: each loads its own copy.
        tasks: tasks that the network may have been trained for; experiments are looked up in the first one's folder.
        batches: approximate number of batches per process, which decides whether compiling the network pays off.

    Raises:
        UsageError: the checkpoint is missing, belongs to another task or contradicts the flags, or the guide does not fit.
    """
    check_method(request.solver)
    device = find_device(request.machine, processes)
    path = _checkpoint_path(request, tasks[0])
    with processes.main_first():  # the main process may download the autoencoder; the others find it in the cache
        model = _load_model(path, request, device, tasks[0])
        guide = _load_guide(request, model, device)
    task = TASKS[model.header.task]
    if task not in tasks:
        raise UsageError(f"{path} was trained for {task.purpose}: use test_flow_latent{task.script}.py")
    warn_of_untrained(model.header, request.solver, request.guidance)
    machine = _choose_machine(request, processes, batches, solver_counts=task is tasks[0])
    fact("machine", machine.describe())
    if processes.is_main:
        check_file(path, request, model, machine)
    sampler = _make_sampler(request, model, guide, machine)
    return LoadedSampler(sampler, path, model.header, _settings(request, model.header, guide, machine))


def _checkpoint_path(request: SamplerRequest, task: Task) -> Path:
    source = request.source
    folder = experiment_folder(source.save_root, request.dataset, source.exp, task.runs)
    return find_checkpoint(source.checkpoint, folder) if source.checkpoint else newest_model(folder, source.epoch_id)


def _load_model(path: Path, request: SamplerRequest, device: torch.device, task: Task) -> LoadedModel:
    """Load a checkpoint whose header agrees with the flags, or another project's, which the flags describe."""
    if not describes_network(path):
        return open_published(path, request.given, device, downstream=task is not GENERATE)
    model = load_model(path, device, _moved_autoencoder(request))
    # Downstream networks may be applied to the images of another dataset.
    _refuse_contradictions(request, model.header, path, free=() if task is GENERATE else ("dataset",))
    return model


def _moved_autoencoder(request: SamplerRequest) -> AutoencoderOptions | None:
    """The autoencoder that the user named; None: the header's."""
    return request.autoencoder if "pretrained_autoencoder_ckpt" in request.given else None


def _load_guide(request: SamplerRequest, model: LoadedModel, device: torch.device) -> LoadedModel | None:
    """Load the weaker network of autoguidance, and check that the networks support the solver and the other guidance.

    Raises:
        UsageError: they do not, or the guide was trained on other latents or for another task.
    """
    name, scale = request.source.guide_checkpoint, request.guidance.cfg_scale
    check_network(model.header.network, request.solver, request.guidance)
    if not name:
        check_guidance(model.header.network.label_dropout, model.header.dense, scale)
        return None
    if scale == 1:
        raise UsageError("--guide_checkpoint has no effect at --cfg_scale 1: give a scale above 1")
    guide = _open_guide(name, request, device)
    check_average_velocity(guide.header.network, request.solver, f"--guide_checkpoint {name}")
    for entry in ("task", "latent_size", "latent_channels", "num_classes"):
        theirs, ours = getattr(guide.header, entry), getattr(model.header, entry)
        if theirs != ours:
            raise UsageError(f"--guide_checkpoint {name}: its {entry} is {theirs}, but the guided network's is {ours}")
    theirs, ours = guide.header.autoencoder, model.header.autoencoder
    if theirs.sha256 != ours.sha256:
        raise UsageError(f"--guide_checkpoint {name}: it was trained on another autoencoder's latents")
    if not theirs.same_scale(ours):
        raise UsageError(
            f"--guide_checkpoint {name}: it was trained on latents with the standard deviations {theirs.latents_std}, but the "
            f"guided network's have {ours.latents_std}"
        )
    return guide


def _open_guide(name: str, request: SamplerRequest, device: torch.device) -> LoadedModel:
    """Open a guide of this project, or of another one whose files show their network; flags describe the guided one."""
    if describes_network(name):
        return load_model(name, device, _moved_autoencoder(request))
    groups: tuple[type, ...] = (NetworkOptions, *network_groups())
    network = {field.name for group in groups for field in fields(group)}
    given = {flag: value for flag, value in request.given.items() if flag not in network}
    try:
        return open_published(Path(name), given, device)
    except UsageError as error:
        raise UsageError(
            f"--guide_checkpoint {name}: {error}. If its network cannot be recognized, convert the file first, with python -m "
            "checkpoints.convert"
        ) from error


def _choose_machine(request: SamplerRequest, processes: Processes, batches: float, solver_counts: bool) -> Machine:
    """Choose the device, the precision, and whether to compile.

    `solver_counts` is False for a task with a fixed solver, where --method has no effect.
    """
    solver = request.solver
    adaptive = SOLVERS[solver.method].adaptive
    if adaptive and solver_counts:
        note_unused(
            request.given,
            FIXED_STEP_FLAGS,
            f"with the adaptive solver {solver.method}, which uses --atol and --rtol",
        )
    precise = needs_float32(solver) and solver_counts
    # A lower bound for fixed-step solvers, because some evaluate the network several times per step.
    evaluations = TYPICAL_ADAPTIVE_EVALUATIONS if adaptive else solver.steps
    machine = choose_machine(request.machine, processes, precise).settled(batches * evaluations, processes)
    if solver_counts and (text := unreachable_tolerances(solver, machine.precision)):
        note(text)
    return machine


def _make_sampler(request: SamplerRequest, model: LoadedModel, guide: LoadedModel | None, machine: Machine) -> Sampler:
    header = model.header
    return Sampler(
        network=_velocity_network(model, machine),
        autoencoder=model.autoencoder,
        facts=header.dataset,
        latent_shape=header.latent_shape,
        num_classes=header.num_classes,
        solver=request.solver,
        machine=machine,
        seed=request.source.seed,
        guidance=request.guidance,
        guide=correct(_velocity_network(guide, machine), guide.header.correction(machine.device)) if guide else None,
        correction=header.correction(machine.device),
        generator=request.source.generator,
        drops_labels=header.drops_labels,
        drops_dense=header.drops_dense,
    )


def _velocity_network(model: LoadedModel, machine: Machine) -> VelocityNetwork:
    """The velocity that the network's objective defines, in the machine's precision."""
    objective = OBJECTIVES[model.header.objective].build(model.header.path)
    return VelocityNetwork(for_sampling(model.network, machine), objective.velocity)


def _settings(request: SamplerRequest, header: Header, guide: LoadedModel | None, machine: Machine) -> dict[str, Any]:
    """The settings of a `LoadedSampler`. Their names are part of the format of samples.json."""
    return {
        "weights_sha256": header.weights_sha256,
        "network": {"model_type": header.model_type, **as_json(header.network)},
        "autoencoder": as_json(header.autoencoder),
        "guide_sha256": guide.header.weights_sha256 if guide else None,
        "seed": request.source.seed,
        "generator": request.source.generator,
        "solver": as_json(request.solver),
        "guidance": as_json(request.guidance),
        "precision": machine.precision,
        "compiled": machine.compile,
    }


def _refuse_contradictions(request: SamplerRequest, header: Header, path: Path, free: Sequence[str]) -> None:
    """Check that the given flags, except the `free` ones, agree with the header.

    Raises:
        UsageError: a flag and the header disagree; the message names both values.
    """
    image_size = header.dataset.image_size
    stored = {"dataset": header.dataset.name, "image_size": image_size, **as_json(header.network)}
    stored |= {"f": image_size // header.latent_size, "scale_factor": _scale_factor(header.autoencoder)}
    given = {name: as_json(value) for name, value in request.given.items() if name in stored and name not in free}
    if "model_type" in request.given or request.network.use_origin_adm:
        stored["model_type"], given["model_type"] = header.model_type, request.network.resolve()
    for name, value in given.items():
        if value != stored[name]:
            raise UsageError(
                f"--{name} {value} contradicts the checkpoint {path}, which has {stored[name]}: "
                "leave the flag out, or choose another checkpoint"
            )
    _refuse_other_statistics(request, header, path)


def _refuse_other_statistics(request: SamplerRequest, header: Header, path: Path) -> None:
    """Check that --latent_statistics, if given, is the scale in the header; a header without a scale allows any.

    Raises:
        UsageError: it is another scale; the message names both.
    """
    chosen, facts = request.given.get("latent_statistics"), header.autoencoder
    if not chosen or facts.statistics == UNMEASURED:
        return
    asked = ""
    if chosen == MEASURED:
        agrees = facts.statistics == MEASURED
    else:
        mean, std, _ = read_chosen_scale(chosen, header.latent_channels, facts.scale_factor)
        agrees = replace(facts, latents_mean=mean, latents_std=std).same_scale(facts)
        asked = f" ({describe_scale(mean, std)})"
    if not agrees:
        origin = facts.statistics or ("" if facts.scale_factor is None else f"--scale_factor {facts.scale_factor:g}")
        raise UsageError(
            f"--latent_statistics {chosen}{asked} contradicts the checkpoint {path}, whose latents have "
            f"{describe_scale(facts.latents_mean, facts.latents_std)} ({origin or 'the scale of the autoencoder'}): leave the "
            "flag out, or choose another checkpoint"
        )


def _scale_factor(autoencoder: AutoencoderFacts) -> float | None:
    """The factor on the statistics of a file, or else the one that is equivalent to the scale; None if there is none."""
    if autoencoder.statistics and autoencoder.scale_factor is not None:
        return autoencoder.scale_factor
    means, stds = autoencoder.latents_mean, autoencoder.latents_std
    return round(1 / stds[0], 6) if not any(means) and len(set(stds)) == 1 else None
