import dataclasses

import pytest
import torch

from demo_page.settings import Limits
from demo_page.watch import Watch, Watched
from options import UsageError
from tests.demo_models import SETTINGS, demo_model


@pytest.fixture(scope="module")
def model():
    return demo_model()


def last(drawings):
    *_, found = drawings
    return found


def image():
    return torch.randint(0, 256, (3, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def hole():
    mask = torch.zeros(14, 14, dtype=torch.bool)
    mask[4:8, 4:10] = True
    return mask


def test_samples_equal_the_python_interfaces(model):
    settings = dataclasses.replace(SETTINGS, scale=2.0, shift=2.0)
    found = last(model.sample([2, 0], 5, settings))
    options = {"steps": 4, "method": "dpm", "time_shift": 2.0, "cfg_scale": 2.0, "cfg_interval": (0.2, 0.7)}
    expected = model.flow.sample(labels=[2, 0, 2, 0, 2], seed=3, **options)
    assert torch.equal(found.images, expected)
    assert found.status.startswith("4 evaluations of the velocity")


def test_paths_lead_from_the_noise_to_the_samples(model):
    found = last(model.sample([], 3, SETTINGS))
    points, data = found.paths
    assert len(points) == len(data) == 5
    sampler = model.flow.sampler(SETTINGS.solver(), SETTINGS.guidance(), 3)
    torch.testing.assert_close(points[0], sampler.noise(range(3)))
    assert torch.equal(model.show(points[-1]), found.images)
    assert torch.equal(points[-1], data[-1])
    assert not torch.equal(points[1], data[1])


def test_interpolation_ends_at_both_seeds_samples(model):
    found = last(model.interpolate(1, 8, 4, SETTINGS)).images
    for index, seed in ((0, 3), (-1, 8)):
        expected = model.flow.sample(labels=[1], seed=seed, method="dpm", steps=4)
        assert (found[index].int() - expected[0].int()).abs().max() <= 1  # batches of other sizes round differently
    assert not torch.equal(found[0], found[-1])


@pytest.mark.parametrize("task", ["generate", "inpaint"])
def test_inpainting_keeps_the_known_pixels(task):
    model = demo_model(task)
    found = last(model.inpaint(image(), hole(), 1, 3, 2, SETTINGS))
    known = (~hole()).expand(3, 3, 14, 14)
    assert torch.equal(found.images[known], image().expand(3, -1, -1, -1)[known])
    assert not torch.equal(found.images[0], found.images[1])
    assert not torch.equal(found.images[0], image())
    evaluations = {"generate": 8, "inpaint": 4}[task]  # four steps, twice each for RePaint
    assert found.status.startswith(f"{evaluations} evaluations")


def test_a_label_map_determines_the_samples():
    model = demo_model("semantic")
    maps = torch.zeros(14, 14, dtype=torch.uint8)
    other = maps.clone()
    other[3:11, 3:11] = 2
    first, again, second = (last(model.draw_map(each, 1, 2, SETTINGS)).images for each in (maps, maps, other))
    assert first.shape == (2, 3, 14, 14)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_label_map_is_padded_like_its_dataset():
    model = demo_model("semantic")
    maps = torch.randint(0, 4, (14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(maps, [1] * 4)
    shares = torch.nn.functional.one_hot(padded.long(), 4).permute(2, 0, 1)[None].float()
    dense = torch.nn.functional.avg_pool2d(shares, 2).expand(2, -1, -1, -1)
    expected = model.flow.sample(labels=[1, 1], seed=3, method="dpm", steps=4, dense=dense)
    assert torch.equal(last(model.draw_map(maps, 1, 2, SETTINGS)).images, expected)


@pytest.mark.parametrize(
    ("task", "call", "message"),
    [
        ("inpaint", lambda model: model.sample([], 2, SETTINGS), "Use the tab Inpaint"),
        ("semantic", lambda model: model.interpolate(0, 1, 2, SETTINGS), "Use the tab Map"),
        ("semantic", lambda model: model.inpaint(image(), hole(), 0, 1, 1, SETTINGS), "Use the tab Map"),
        (
            "generate",
            lambda model: model.draw_map(torch.zeros(14, 14), 0, 1, SETTINGS),
            "was not trained on label maps",
        ),
        ("generate", lambda model: model.sample([], 9, SETTINGS), "1 to 8 samples"),
        ("generate", lambda model: model.sample([7], 1, SETTINGS), r"class ids .* got \[7\]"),
        (
            "generate",
            lambda model: model.sample([], 1, dataclasses.replace(SETTINGS, steps=21)),
            "at most 20 steps",
        ),
        ("generate", lambda model: model.inpaint(image(), hole(), 0, 1, 0, SETTINGS), "at least one repetition"),
        (
            "generate",
            lambda model: model.sample([], 1, dataclasses.replace(SETTINGS, method="flow_map")),
            "needs a network that predicts average velocities",
        ),
        (
            "generate",
            lambda model: model.sample([], 1, dataclasses.replace(SETTINGS, internal=2.0)),
            "needs a network with an auxiliary velocity head",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(task, call, message):
    with pytest.raises(UsageError, match=message):
        last(call(demo_model(task)))


def test_a_request_ends_at_its_time_limit():
    model = demo_model(limits=Limits(8, 20, 0.0))
    with pytest.raises(UsageError, match="longer than 0 seconds"):
        last(model.sample([], 1, SETTINGS))


def test_a_request_that_is_left_stops_the_network(model):
    watch = Watch(60.0)
    sampler = watch.watched(model.flow.sampler(SETTINGS.solver(), SETTINGS.guidance(), 3))
    velocity, noise, t = sampler.velocity(torch.tensor([0])), sampler.noise([0]), torch.tensor(1.0)

    def work():
        while True:
            velocity(t, noise)

    watched = Watched(model.executor, watch, work)
    states = iter(watched)
    next(states)
    states.close()
    assert watch.evaluations > 0
    with pytest.raises(UsageError, match="stopped"):
        watched.result  # noqa: B018


def test_a_network_trained_for_one_class_needs_no_label(model):
    ids = model._labels([], 4)
    assert ids.tolist() == [0, 1, 2, 0]
    assert model._labels([], 2, alike=True).tolist() == [3, 3]
    assert demo_model(label_dropout=0.0)._labels([], 2, alike=True).tolist() == [0, 0]
