"""Snapshots of power averages, and checkpoints rebuilt from them."""

import signal

import pytest
import torch

from checkpoints.files import read_weights
from checkpoints.header import PowerAverage
from options import UsageError
from runtime.torch_files import read_torch_file
from tests.training.test_loop import assert_same_run, new_run, send_signal
from training.averages.reconstruction import choose_step, rebuild, rebuild_file
from training.averages.snapshots import list_snapshots, snapshot_interval, to_half_precision
from training.loop import train
from training.run import TrainingOptions

WIDTHS = (0.05, 0.075, 0.1)
TRACKED = {"posthoc_ema": WIDTHS, "posthoc_ema_every": 1}
STEPS = 14  # of new_run


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with a snapshot after every step, of three widths."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    assert train(new_run(folder, **TRACKED), resume=False)
    return folder


def relative_difference(one, other):
    assert one.keys() == other.keys()
    first, second = (torch.cat([each[name].double().flatten() for name in one]) for each in (one, other))
    return ((first - second).norm() / second.norm()).item()


def test_tracking_changes_nothing_else(tracked, tmp_path):
    assert train(new_run(tmp_path / "plain"), resume=False)
    assert not (tmp_path / "plain" / "posthoc_ema").exists()
    plain, own = (read_torch_file(folder / "content.pth") for folder in (tmp_path / "plain", tracked))
    assert own.keys() - plain.keys() == {"posthoc_ema"}
    for part in (lambda content: content["network"], lambda content: content["ema"]["weights"]):
        assert all(torch.equal(value, part(own)[name]) for name, value in part(plain).items())
    one, other = (read_weights(folder / "model_3.safetensors") for folder in (tmp_path / "plain", tracked))
    assert one[1].weights_sha256 == other[1].weights_sha256
    assert one[1].average is None
    assert other[1].average is None


@pytest.mark.parametrize(("fetch", "number"), [(2, signal.SIGINT), (8, signal.SIGTERM)])
def test_an_interrupted_run_continues_its_averages_bit_for_bit(tracked, tmp_path, fetch, number):
    folder = tmp_path / "run"
    assert not train(new_run(folder, event=(fetch, send_signal(number)), **TRACKED), resume=False)
    assert train(new_run(folder, **TRACKED), resume=True)
    assert_same_run(folder, tracked)


def test_a_resumed_run_removes_snapshots_from_after_its_training_state(tracked, tmp_path, capsys):
    folder = tmp_path / "run"

    def crash():
        raise RuntimeError("crash")

    run = new_run(folder, event=(9, crash), experiment={"save_content_every": 1}, **TRACKED)
    with pytest.raises(RuntimeError, match="crash"):
        train(run, resume=False)
    step = read_torch_file(folder / "content.pth")["step"]
    (folder / "posthoc_ema" / "sigma_0.05_step_0000099.safetensors").write_bytes(b"of a longer run")
    stored = len(list((folder / "posthoc_ema").iterdir()))
    assert train(new_run(folder, **TRACKED), resume=True)
    output = capsys.readouterr()
    assert f"removed {stored - 3 * step} snapshots" in output.err
    assert f"; {3 * step} snapshots there" in output.out
    names = {path.name for path in (folder / "posthoc_ema").iterdir()}
    assert names == {path.name for path in (tracked / "posthoc_ema").iterdir()}


def test_snapshots_are_set_aside_when_a_run_starts_again(tmp_path, capsys):
    settings = {"experiment": {"save_content": False}, **TRACKED}
    assert not train(new_run(tmp_path / "run", event=(7, send_signal(signal.SIGINT)), **settings), resume=False)
    for path in (tmp_path / "run").glob("content*.pth"):
        path.unlink()
    assert train(new_run(tmp_path / "run", **settings), resume=True)
    assert "posthoc_ema.old-1" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "posthoc_ema").iterdir())) == 3 * STEPS


@pytest.mark.parametrize("widths", [(), (0.05, 0.1)])
def test_a_training_state_with_other_averages_is_refused(tracked, tmp_path, widths):
    """The options in config.json, which would be refused first, may be lost."""
    (tmp_path / "content.pth").write_bytes((tracked / "content.pth").read_bytes())
    run = new_run(tmp_path, posthoc_ema=widths, max_steps=20)
    with pytest.raises(UsageError, match=r"averages of the widths 0\.05 0\.075 0\.1, but --posthoc_ema asks for"):
        train(run, resume=True)


def test_snapshots_are_checkpoints_in_half_precision(tracked):
    snapshots = list_snapshots(tracked)
    assert [snapshot.header.step for snapshot in snapshots] == [step for step in range(1, STEPS + 1) for _ in WIDTHS]
    last = snapshots[-1]
    assert last.average == PowerAverage(0.1, STEPS)
    weights, _ = read_weights(last.path)
    network = new_run(tracked.parent / "another").network
    exact = read_torch_file(tracked / "content.pth")["posthoc_ema"]["0.1"]["weights"]
    for name, value in network.state_dict(keep_vars=True).items():
        assert weights[name].dtype == (torch.float16 if value.requires_grad else torch.float32)
        torch.testing.assert_close(weights[name].float(), exact[name], rtol=2**-11, atol=2**-24)
    assert torch.equal(weights["pos_embed"], network.pos_embed)
    network.load_state_dict(weights)


def test_a_stored_average_is_rebuilt_exactly(tracked):
    snapshots = list_snapshots(tracked)
    weights, header, error = rebuild(snapshots, 0.1)
    stored = read_weights(snapshots[-1].path)[0]
    assert relative_difference(weights, {name: value.float() for name, value in stored.items()}) < 1e-6
    assert (header.average, header.step) == (PowerAverage(0.1, STEPS), STEPS)
    assert error < 1e-6


@pytest.mark.parametrize("step", [10, STEPS])
def test_a_width_between_the_stored_ones_equals_the_tracked_average(tracked, step):
    snapshots = choose_step(list_snapshots(tracked), step)
    others = [snapshot for snapshot in snapshots if snapshot.average.sigma_rel != 0.075]
    direct = next(s for s in reversed(snapshots) if s.average.sigma_rel == 0.075)
    weights, header, error = rebuild(others, 0.075)
    assert header.average == direct.average == PowerAverage(0.075, step)
    expected, neighbor = (read_weights(path)[0] for path in (direct.path, others[-1].path))
    assert relative_difference(weights, expected) < 1e-3 < relative_difference(neighbor, expected)
    assert error < 0.02
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_rebuilt_file_is_an_ordinary_checkpoint(tracked, tmp_path, capsys):
    path = tmp_path / "rebuilt.safetensors"
    rebuild_file(list_snapshots(tracked), 0.08, path)
    weights, header = read_weights(path)
    assert (header.average, header.step, header.ended) == (PowerAverage(0.08, STEPS), STEPS, True)
    network = new_run(tmp_path / "another").network
    assert torch.equal(weights["pos_embed"], network.pos_embed)
    network.load_state_dict(weights)
    captured = capsys.readouterr()
    assert f"sigma_rel 0.08 at step {STEPS}, profile within" in captured.out
    assert "warning" not in captured.err
    rebuild_file(choose_step(list_snapshots(tracked), 3), 0.25, path)
    assert "warning: sigma_rel 0.25: the snapshots match its profile only within" in capsys.readouterr().err


def test_wrong_folders_and_steps_are_one_line(tracked, tmp_path):
    with pytest.raises(UsageError, match=r"has no snapshots in posthoc_ema/.*--posthoc_ema 0\.05 0\.10"):
        list_snapshots(tmp_path)
    with pytest.raises(UsageError, match=r"--step 99: expected the step of a snapshot, one of 1, 2, 3, .* and 4 more"):
        choose_step(list_snapshots(tracked), 99)
    (tmp_path / "posthoc_ema").mkdir()
    for source, reason in ((tracked / "model_3.safetensors", "not a snapshot"), (tracked / "config", "cannot read")):
        data = source.read_bytes() if source.exists() else b"damaged"
        (tmp_path / "posthoc_ema" / "sigma_0.05_step_0000001.safetensors").write_bytes(data)
        with pytest.raises(UsageError, match=rf"{reason}.*[Rr]emove"):
            list_snapshots(tmp_path)


def test_weights_out_of_half_precisions_range_keep_their_type():
    weights = {"a": torch.tensor([1.0]), "b": torch.tensor([7e4]), "table": torch.tensor([0.1]), "n": torch.tensor(3)}
    halved = to_half_precision(weights, {"a", "b"})
    assert [value.dtype for value in halved.values()] == [torch.float16, torch.float32, torch.float32, torch.int64]


def test_the_interval_divides_the_run_into_32_parts():
    assert [snapshot_interval(0, steps) for steps in (1, 32, 33, 3000)] == [1, 1, 2, 94]
    assert snapshot_interval(7, 3000) == 7


@pytest.mark.parametrize("widths", [(0.05,), (0.05, 0.05)])
def test_one_width_does_not_suffice(widths):
    with pytest.raises(UsageError, match="expected two or more different relative widths"):
        TrainingOptions(posthoc_ema=widths).check()


def test_the_interval_needs_widths():
    with pytest.raises(UsageError, match="--posthoc_ema_every needs --posthoc_ema"):
        TrainingOptions(posthoc_ema_every=5).check()
