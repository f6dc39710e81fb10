"""Training twice, or with interruptions, gives the same weights, EMA, optimizer state and metrics bit for bit."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import training.loop
import training.resources
from checkpoints.files import read_weights
from checkpoints.header import Header
from datasets_prep.augmentation.variants import AugmentedMoments, VariantRecipe, variants_of
from datasets_prep.datasets import DatasetFacts, ImageDataset
from datasets_prep.moments import EncodedImages
from flow.guidance import GuidanceOptions
from flow.losses.options import FlowMatchingOptions, contrastive_weight
from flow.objectives import OBJECTIVES
from flow.solvers import SolverOptions
from models.autoencoders.pixels import PixelSpace
from models.dit import DiT, DiTOptions
from models.registry import NETWORKS
from options import UsageError, as_json
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.torch_files import read_torch_file
from training.experiment import ExperimentOptions
from training.loop import train
from training.resources import estimate_memory
from training.run import TrainingOptions, TrainingRun
from training.state import TrainingState
from training.validation import Validation

MACHINE = Machine(torch.device("cpu"), "fp32")
COUNT, BATCH, STEPS = 40, 8, 14  # five steps per epoch; the last epoch is incomplete
FACTS = DatasetFacts("stripes", 4, 1, None, True, ("rows", "columns"))
NETWORK = DiTOptions(1, 1, num_classes=2, label_dropout=0.2)


class Source(EncodedImages):
    """Encodes on the fly, and calls a function before a given call."""

    event = None
    calls = 0

    def moments(self, indices, mirrored):
        self.calls += 1
        if self.event and self.calls == self.event[0]:
            self.event[1]()
        return super().moments(indices, mirrored)


def stripes():
    rows = (torch.arange(4) % 2 * 255).to(torch.uint8)[:, None].expand(4, 4)
    images = torch.stack([rows, rows.T])[torch.arange(COUNT) % 2][:, None]
    return ImageDataset(FACTS, "train", np.arange(COUNT) % 2, images.__getitem__, "f")


EVERY_SWITCH = FlowMatchingOptions(
    training_time_shift=1.5,
    coupling="optimal_transport",
    prediction="data",
    velocity_direction=0.5,
    contrastive_weight=0.1,
    loss_weighting="min_snr",
)

CONTRASTED = FlowMatchingOptions(contrastive_weight=0.3, velocity_direction=0.5, prediction="data")


def new_run(folder, event=None, experiment=None, processes=Processes(), path=FlowMatchingOptions(), **changes):  # noqa: B008
    """A run of a tiny network on stripes in pixel space. `event` (n, action) calls `action` at the n-th fetch of a batch."""
    dataset = stripes()
    source, held_out = (Source(dataset, PixelSpace(1).encode, MACHINE, 1) for _ in range(2))
    source.event = event
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiT(4, 2, 16, 1, 2, NETWORK)
    chosen = {
        "batch_size": BATCH // processes.count,
        "max_steps": STEPS,
        "lr": 1e-2,
        "grad_clip": 1.0,
        "ema_decay": 0.9,
    } | changes
    shown = {"log_every": 4, "eval_every": 1, "plot_every": 2, "save_ckpt_every": 1} | (experiment or {})
    options = TrainingOptions(**chosen)
    means = (0.1,) * 16 if contrastive_weight(path) else ()
    facts = {"training": as_json(options), "path": path, "contrast_means": means}
    header = Header("DiT-Mi/2", NETWORK, 4, PixelSpace(1).describe(), FACTS, **facts)
    objective = OBJECTIVES["flow_matching"].build(path)
    validation = Validation(
        header=header,
        dataset=dataset,
        held_out=held_out,
        autoencoder=PixelSpace(1),
        objective=objective,
        solver=SolverOptions("euler", 2),
        guidance=GuidanceOptions(1.5),
        seed=1,
        machine=MACHINE,
        derived="",
        samples=0,
        features=None,
        processes=Processes() if options.fsdp else processes,
    )
    folder.mkdir(exist_ok=True, parents=True)
    return TrainingRun(
        folder=folder,
        network=network,
        source=source,
        autoencoder=PixelSpace(1),
        header=header,
        objective=objective,
        training=options,
        experiment=ExperimentOptions(**shown),
        machine=MACHINE,
        processes=processes,
        validation=validation,
    )


def send_signal(number):
    return lambda: os.kill(os.getpid(), number)


def metrics_of(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("seconds", "images_per_s")} for entry in entries]


def state_of(folder):
    """content.pth as bytes and numbers that can be compared, without the seconds."""

    def comparable(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: comparable(item) for key, item in value.items()}
        return [comparable(item) for item in value] if isinstance(value, list) else value

    content = read_torch_file(folder / "content.pth")
    assert content.pop("seconds") > 0
    return comparable(content)


def assert_same_run(one, other):
    files = [
        {path.relative_to(run) for kind in ("*.safetensors", "*.png") for path in run.rglob(kind)}
        for run in (one, other)
    ]
    assert files[0] == files[1]
    for path in files[0]:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path
    assert metrics_of(one) == metrics_of(other)
    assert state_of(one) == state_of(other)


def assert_same_metrics_up_to_rounding(one, other, rel):
    for entry, same in zip(metrics_of(one), metrics_of(other), strict=True):
        assert entry.pop("kind") == same.pop("kind")
        assert entry == pytest.approx(same, rel=rel)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("loop") / "whole"
    assert train(new_run(folder), resume=False)
    return folder


def test_training_again_gives_the_same_run_bit_for_bit(reference_run, tmp_path):
    torch.manual_seed(7)  # the global state must not matter
    assert train(new_run(tmp_path / "run"), resume=False)
    assert_same_run(tmp_path / "run", reference_run)


def test_another_seed_gives_another_run(reference_run, tmp_path):
    train(new_run(tmp_path / "run", seed=5), resume=False)
    assert metrics_of(tmp_path / "run")[0]["loss"] != metrics_of(reference_run)[0]["loss"]


@pytest.mark.parametrize(
    ("fetch", "number"), [(2, signal.SIGINT), (7, signal.SIGINT), (11, signal.SIGTERM), (STEPS - 1, signal.SIGUSR1)]
)
def test_interrupted_run_resumes_bit_for_bit(reference_run, tmp_path, fetch, number):
    folder = tmp_path / "run"
    assert not train(new_run(folder, event=(fetch, send_signal(number))), resume=False)
    step = read_torch_file(folder / "content.pth")["step"]
    assert fetch - 1 <= step <= fetch  # the current step is completed, and batches are fetched one step ahead
    assert train(new_run(folder), resume=True)
    assert_same_run(folder, reference_run)


def test_a_run_with_every_switch_of_the_loss_resumes_bit_for_bit(reference_run, tmp_path):
    assert train(new_run(tmp_path / "whole", path=EVERY_SWITCH), resume=False)
    folder = tmp_path / "run"
    assert not train(new_run(folder, event=(7, send_signal(signal.SIGINT)), path=EVERY_SWITCH), resume=False)
    assert train(new_run(folder, path=EVERY_SWITCH), resume=True)
    assert_same_run(folder, tmp_path / "whole")
    assert metrics_of(folder)[0]["loss"] != metrics_of(reference_run)[0]["loss"]


def test_run_interrupted_again_and_again(reference_run, tmp_path):
    folder, starts = tmp_path / "run", 1
    while not train(new_run(folder, event=(3, send_signal(signal.SIGINT))), resume=True):
        starts += 1
        assert starts < STEPS
    assert starts > 3
    assert_same_run(folder, reference_run)


def test_a_run_with_optional_parts_of_dit_resumes_bit_for_bit(tmp_path, monkeypatch):
    parts = {"norm": "rms_affine", "mlp": "swiglu", "qk_norm": True, "rope": True, "shared_adaln": True}
    options = replace(NETWORK, **parts, class_tokens=2, time_embedding="fourier", time_scale_factor=2.0)
    monkeypatch.setitem(globals(), "NETWORK", options)
    assert train(new_run(tmp_path / "whole"), resume=False)
    assert not train(new_run(tmp_path / "stopped", (3, send_signal(signal.SIGTERM))), resume=False)
    assert train(new_run(tmp_path / "stopped"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def new_augmented_run(folder, event=None, **settings):
    """A run that also trains on variants of the images, whose network takes their parameters."""
    run = new_run(folder, event, **settings)
    recipe = VariantRecipe(("flip", "crop"), 2, mirrored=False)
    variants = EncodedImages(variants_of(stripes(), recipe), PixelSpace(1).encode, MACHINE, 1)
    options = replace(NETWORK, augment=recipe.kinds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiT(4, 2, 16, 1, 2, options)
    header = replace(run.header, network=options)
    return replace(run, network=network, header=header, source=AugmentedMoments(run.source, variants, recipe, 0.5))


def test_a_run_with_augmentation_resumes_bit_for_bit(reference_run, tmp_path):
    assert train(new_augmented_run(tmp_path / "whole"), resume=False)
    assert not train(new_augmented_run(tmp_path / "stopped", (7, send_signal(signal.SIGTERM))), resume=False)
    assert train(new_augmented_run(tmp_path / "stopped"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    averages = [
        read_torch_file(folder / "content.pth")["ema"]["weights"] for folder in (tmp_path / "whole", reference_run)
    ]
    assert averages[0].pop("augment_embedder.weight").abs().max() > 0
    assert averages[0].keys() == averages[1].keys()


def test_a_crashed_run_resumes_from_its_last_training_state(reference_run, tmp_path):
    def crash():
        raise RuntimeError("power cut")

    folder, often = tmp_path / "run", {"save_content_every_steps": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        train(new_run(folder, event=(12, crash), experiment=often), resume=False)
    assert read_torch_file(folder / "content.pth")["step"] == 9
    assert metrics_of(folder)[-1]["step"] > 9  # these entries will be recorded again
    assert train(new_run(folder, experiment=often), resume=True)
    assert_same_run(folder, reference_run)


def test_a_run_without_its_last_preview_is_saved(reference_run, tmp_path, monkeypatch):
    def fail(validation, network):
        raise RuntimeError("no picture")

    monkeypatch.setattr(Validation, "preview", fail)
    assert train(new_run(tmp_path / "run", experiment={"plot_every": 1000}), resume=False)
    assert read_torch_file(tmp_path / "run" / "content.pth")["step"] == STEPS
    for path in reference_run.glob("*.safetensors"):
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()


def test_a_complete_run_is_not_changed(reference_run):
    before = {path: path.read_bytes() for path in reference_run.rglob("*") if path.is_file()}
    assert train(new_run(reference_run), resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_files_of_a_run(reference_run):
    assert {path.name for path in reference_run.glob("*.safetensors")} == {
        *(f"model_{epoch}.safetensors" for epoch in (1, 2, 3)),
        "best.safetensors",
    }
    assert {path.name for path in (reference_run / "samples").iterdir()} == {"step_0000010.png", "step_0000014.png"}
    for epoch, step in [(1, 5), (2, 10), (3, STEPS)]:
        weights, header = read_weights(reference_run / f"model_{epoch}.safetensors")
        assert (header.epoch, header.step) == (epoch, step)
        assert header.network == NETWORK
    average = read_torch_file(reference_run / "content.pth")["ema"]["weights"]
    assert all(torch.equal(weights[name], value) for name, value in average.items())


def test_best_has_the_lowest_validation_loss(reference_run):
    losses = {entry["step"]: entry["loss"] for entry in metrics_of(reference_run) if entry["kind"] == "validation"}
    assert list(losses) == [5, 10, STEPS]
    _, header = read_weights(reference_run / "best.safetensors")
    assert losses[header.step] == min(losses.values()) == read_torch_file(reference_run / "content.pth")["best"]


def test_metrics_have_the_mean_loss_of_each_interval(reference_run, tmp_path):
    train(new_run(tmp_path / "run", experiment={"log_every": 1}), resume=False)
    each = [entry["loss"] for entry in metrics_of(tmp_path / "run") if entry["kind"] == "train"]
    entries = [entry for entry in metrics_of(reference_run) if entry["kind"] == "train"]
    assert [entry["step"] for entry in entries] == [4, 8, 12]
    assert len(each) == STEPS
    for entry in entries:
        assert entry["loss"] == pytest.approx(np.mean(each[entry["step"] - 4 : entry["step"]]), rel=1e-5)
        assert entry["skipped"] == 0


def test_the_loss_decreases(tmp_path):
    """Starts near the zero velocity's loss, E noise^2 + E data^2 = 2 for data of -1 and 1."""
    quiet = {"log_every": 20, "eval_every": 100, "plot_every": 100}
    train(new_run(tmp_path / "run", experiment=quiet, max_steps=160, lr_schedule="trapezoid"), resume=False)
    losses = [entry["loss"] for entry in metrics_of(tmp_path / "run") if entry["kind"] == "train"]
    assert 1 < losses[0] < 2.2
    assert losses[-1] < 0.6 * losses[0]
    rates = [entry["lr"] for entry in metrics_of(tmp_path / "run") if entry["kind"] == "train"]
    assert rates[0] == 1e-2 > rates[-1]


def test_num_epoch_applies_without_max_steps(tmp_path):
    assert train(new_run(tmp_path / "run", max_steps=0, num_epoch=2), resume=False)
    assert read_torch_file(tmp_path / "run" / "content.pth")["step"] == 10


def test_minutes_between_grids_validations_and_checkpoints_change_no_weights(reference_run, tmp_path):
    """Minutes so few that they are over after every step, and so many that they never are: the epochs then do not count."""
    found = {}
    for minutes in (1e-9, 1e9):
        folder = tmp_path / f"{minutes}"
        names = ("plot_every_minutes", "eval_every_minutes", "save_ckpt_every_minutes")
        assert train(new_run(folder, experiment=dict.fromkeys(names, minutes)), resume=False)
        validated = {entry["step"]: entry["loss"] for entry in metrics_of(folder) if entry["kind"] == "validation"}
        assert read_weights(folder / "best.safetensors")[1].step == min(validated, key=validated.__getitem__)
        checkpoints = {path.name for path in folder.glob("model_*.safetensors")}
        found[minutes] = (list(validated), len(list((folder / "samples").iterdir())), len(checkpoints))
        same = state_of(folder)
        best = same.pop("best")
        assert best == min(validated.values())
        assert same == {name: value for name, value in state_of(reference_run).items() if name != "best"}
        last = (folder / "model_3.safetensors").read_bytes()
        assert last == (reference_run / "model_3.safetensors").read_bytes()
    assert found == {1e-9: (list(range(1, STEPS + 1)), STEPS, 3), 1e9: ([STEPS], 1, 1)}


def test_a_run_may_resume_with_another_rhythm(reference_run, tmp_path):
    often = {"eval_every_minutes": 1e-9, "plot_every_minutes": 1e-9}
    folder = tmp_path / "run"
    assert not train(new_run(folder, event=(7, send_signal(signal.SIGINT)), experiment=often), resume=False)
    assert train(new_run(folder), resume=True)
    last = (folder / "model_3.safetensors").read_bytes()
    assert last == (reference_run / "model_3.safetensors").read_bytes()


def test_max_minutes_ends_the_run_with_a_note(tmp_path, capsys):
    assert train(new_run(tmp_path / "run", max_minutes=1e-9), resume=False)
    assert "--max_minutes ended the run at step 1 of 14, so it is not reproducible" in capsys.readouterr().err
    assert read_weights(tmp_path / "run" / "model_1.safetensors")[1].step == 1
    assert read_torch_file(tmp_path / "run" / "content.pth")["step"] == 1
    assert (tmp_path / "run" / "samples" / "step_0000001.png").exists()


def test_without_ema_the_raw_weights_are_saved(tmp_path):
    train(new_run(tmp_path / "run", use_ema=False, max_steps=3), resume=False)
    network = read_torch_file(tmp_path / "run" / "content.pth")["network"]
    weights, _ = read_weights(tmp_path / "run" / "model_1.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in network.items())


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation_gives_the_same_run_up_to_rounding(reference_run, tmp_path, parts):
    train(new_run(tmp_path / "run", grad_accumulation=parts), resume=False)
    assert_same_metrics_up_to_rounding(tmp_path / "run", reference_run, rel=1e-4)


def test_a_finished_run_without_training_state_is_complete(tmp_path, capsys):
    never = {"save_content": False}
    train(new_run(tmp_path / "run", experiment=never, max_steps=6), resume=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(new_run(tmp_path / "run", experiment=never, max_steps=6), resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with pytest.raises(UsageError, match=r"ended at step 6 without a content\.pth .*--init_from .*model_2"):
        train(new_run(tmp_path / "run", experiment=never, max_steps=9), resume=True)


def test_a_crashed_run_without_training_state_starts_over(reference_run, tmp_path, capsys):
    def crash():
        raise RuntimeError("power cut")

    never = {"save_content": False}
    with pytest.raises(RuntimeError, match="power cut"):
        train(new_run(tmp_path / "run", event=(12, crash), experiment=never), resume=False)
    assert train(new_run(tmp_path / "run", experiment=never), resume=True)
    assert "no content.pth to resume from, so training starts at the first step" in capsys.readouterr().err
    assert metrics_of(tmp_path / "run") == metrics_of(reference_run)


def test_signal_handlers_are_restored_after_training(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(new_run(tmp_path / "run", max_steps=1), resume=False)
    assert signal.getsignal(signal.SIGTERM) == before


def test_training_state_is_saved_only_if_requested_or_needed(tmp_path):
    never = {"save_content": False}
    train(new_run(tmp_path / "run", experiment=never, max_steps=3), resume=False)
    assert not (tmp_path / "run" / "content.pth").exists()
    run = new_run(tmp_path / "other", event=(2, send_signal(signal.SIGINT)), experiment=never)
    assert not train(run, resume=False)
    assert (tmp_path / "other" / "content.pth").exists()


def test_the_memory_of_a_step_is_shown_on_gpus_only(tmp_path, monkeypatch, capsys):
    train(new_run(tmp_path / "cpu", max_steps=1), resume=False)
    assert "memory   " not in capsys.readouterr().out
    monkeypatch.setattr(training.resources, "free_memory", lambda device: (10**9, 2 * 10**9))
    train(new_run(tmp_path / "gpu", max_steps=1), resume=False)
    shown = capsys.readouterr()
    assert (
        "memory      about 0.0 GB: weights 0.0, gradients 0.0, optimizer 0.0, EMA 0.0, activations of 8 images"
        in shown.out
    )
    assert "1.0 of 2.0 GB are free, enough for" in shown.out
    assert "warning" not in shown.err
    monkeypatch.setattr(training.resources, "free_memory", lambda device: (10**5, 10**5))
    train(new_run(tmp_path / "small", max_steps=1, batch_size=20), resume=False)
    assert "warning: the training step is estimated to need 0.0 GB" in capsys.readouterr().err


def test_a_network_whose_memory_cannot_be_estimated_is_trained(tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(training.resources, "free_memory", lambda device: (10**9, 10**9))
    monkeypatch.setattr(training.resources, "measure_activations", fails)
    assert train(new_run(tmp_path, max_steps=1), resume=False)
    assert "note: the memory of a step was not estimated: RuntimeError" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimate_counts_what_the_state_holds(tmp_path, optimizer):
    run = new_run(tmp_path, optimizer=optimizer)
    needed = estimate_memory(run)
    state = TrainingState(run.network, MACHINE, 0.9, run.training, None, NETWORKS["DiT-Mi/2"].hidden_matrices)
    batch = next(training.loop._batches(run, 0, 1))
    state.advance(run.network, run.objective, batch, 1e-2, 0.0)
    steps = 4 * len(state.parameters)  # AdamW counts steps for each parameter

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [t for o in state.optimizers for values in o.state.values() for t in values.values()]
    assert needed.optimizer == pytest.approx(size(moments), abs=steps)
    assert needed.gradients == size(parameter.grad for parameter in state.parameters)
    assert needed.weights == needed.average == size(state.ema.weights.values())
    assert needed.images == BATCH
