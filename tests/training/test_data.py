"""A step's batch is a function of (seed, step, global sample index), and independent of processes, call order and restarts."""

import hashlib
import threading

import pytest
import torch

from datasets_prep.augmentation.variants import AugmentedMoments, VariantRecipe
from datasets_prep.moments import mean_latents
from flow.auxiliary.objective import WithAuxiliary
from flow.losses.contrast import Correction
from flow.losses.options import FlowMatchingOptions
from flow.losses.terms import TrainingDraws
from flow.objectives import OBJECTIVES, FlowMatching, Times
from flow.paths import PathOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.conditions import Condition, DenseInput
from options import UsageError
from runtime.distributed import Processes
from runtime.randomness import generator_for
from tests.drawn_batches import draw_batches
from training.data import Batch, StepStreams
from training.reading.ahead import read_ahead
from training.reading.order import epoch_indices, steps_per_epoch

COUNT, CLASSES = 23, 5


class Numbered:
    """Moments whose upper left value is the image's index, and whose upper right value is 1 if it is mirrored."""

    def __init__(self, channels=1, count=COUNT):
        self.channels = channels
        self.labels = torch.arange(count) % CLASSES

    def __len__(self):
        return len(self.labels)

    def moments(self, indices, mirrored):
        moments = torch.zeros(len(indices), self.channels, 2, 2)
        moments[:, :, 0, 0] = indices[:, None].float()
        moments[:, :, 0, 1] = mirrored[:, None].float()
        return moments


class NumberedCondition:
    """Maps with the image's index, whether it is mirrored, the draw's number, and the noise."""

    dense = DenseInput(4)

    def read(self, indices, mirrored, draws):
        return torch.stack([indices, mirrored.long(), torch.tensor(list(draws))], dim=1)[..., None, None]

    def encode(self, raw, noise):
        return torch.cat([raw.float().expand(-1, -1, 2, 2), noise[:, :1]], dim=1)


def draw(first, last, *, source=None, processes=Processes(), batch_size=6, seed=3, **changes):  # noqa: B008
    settings = {"num_classes": CLASSES, "label_dropout": 0.2, "device": torch.device("cpu")} | changes
    autoencoder = settings.pop("autoencoder", PixelSpace(1))
    settings |= {"objective": FlowMatching(settings.pop("path", PathOptions())), "batch_size": batch_size, "seed": seed}
    return list(draw_batches(source or Numbered(), autoencoder, first, last, processes=processes, **settings))


def images_of(batch):
    return batch.data[:, 0, 0, 0].long().tolist()


def columns_of(batch):
    """Data, noise, times, labels and dense map of a batch."""
    return batch.data, batch.noise, *batch.draws, *batch.condition


def same(one, other):
    pairs = zip(columns_of(one), columns_of(other), strict=True)
    return all(a is None is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def concatenate(batches):
    columns = zip(*map(columns_of, batches), strict=True)
    data, noise, t, *condition = (None if column[0] is None else torch.cat(column) for column in columns)
    return Batch(data, noise, Times(t), Condition(*condition))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "stratified"])
def test_processes_share_out_one_processs_batch(sampling):
    path = PathOptions(time_sampling=sampling)
    alone = draw(2, 9, path=path)
    for count in (2, 3):
        shares = [draw(2, 9, path=path, processes=Processes(r, count), batch_size=6 // count) for r in range(count)]
        for step, whole in enumerate(alone):
            assert same(concatenate([share[step] for share in shares]), whole)


def test_posterior_samples_do_not_depend_on_the_number_of_processes():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = PretrainedAutoencoder(new_autoencoder_kl(1, (8, 8), 2, 8, {}), "tiny")
    settings = {"source": Numbered(channels=4), "autoencoder": autoencoder}
    (whole,) = draw(0, 1, **settings)
    (first,), (second,) = (draw(0, 1, **settings, processes=Processes(r, 2), batch_size=3) for r in (0, 1))
    assert torch.equal(torch.cat([first.data, second.data]), whole.data)
    assert whole.data.shape == (6, 2, 2, 2)
    (again,) = draw(1, 2, **settings)
    assert not torch.equal(again.noise, whole.noise)


def test_starting_at_a_step_equals_skipping_the_steps_before_it():
    whole = draw(0, 10)
    for first in (1, 3, 4, 9):  # an epoch has 3 steps
        assert all(same(a, b) for a, b in zip(draw(first, 10), whole[first:], strict=True))
    assert draw(10, 10) == []


def test_every_epoch_visits_each_image_once_in_a_new_order():
    epochs = [draw(4 * epoch, 4 * epoch + 4, source=Numbered(count=20), batch_size=5) for epoch in range(3)]
    orders = [[number for batch in epoch for number in images_of(batch)] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] == epoch_indices(3, 1, 20).tolist()


def test_incomplete_batches_are_dropped_until_another_epoch():
    assert steps_per_epoch(COUNT, 6) == 3
    seen = [number for batch in draw(0, 3) for number in images_of(batch)]
    assert len(set(seen)) == len(seen) == 18
    later = {number for batch in draw(3, 60) for number in images_of(batch)}
    assert later == set(range(COUNT))


def test_labels_match_their_images_and_are_dropped_at_the_given_rate():
    drawn = draw(0, 300)
    numbers = torch.tensor([number for batch in drawn for number in images_of(batch)])
    labels = torch.cat([batch.condition.labels for batch in drawn])
    kept = labels != CLASSES
    assert torch.equal(labels[kept], numbers[kept] % CLASSES)
    dropped = (~kept).double().mean().item()
    assert abs(dropped - 0.2) < 4 * (0.2 * 0.8 / len(labels)) ** 0.5
    assert all((batch.condition.labels != CLASSES).all() for batch in draw(0, 50, label_dropout=0.0))


def test_half_of_the_images_are_mirrored_if_the_dataset_flips():
    mirrored = torch.cat([batch.data[:, 0, 0, 1] for batch in draw(0, 300)])
    assert abs(mirrored.mean().item() - 0.5) < 4 * 0.5 / len(mirrored) ** 0.5
    assert not any(batch.data[:, 0, 0, 1].any() for batch in draw(0, 50, flips=False))


def test_noise_is_standard_normal_and_times_uniform():
    drawn = draw(0, 300)
    noise = torch.cat([batch.noise for batch in drawn]).flatten()
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / len(noise)) ** 0.5
    t = torch.cat([batch.draws.t for batch in drawn]).sort().values
    assert (t - torch.linspace(0, 1, len(t))).abs().max() < 2 / len(t) ** 0.5  # Kolmogorov-Smirnov test
    neighbours = torch.stack([noise[:-1], noise[1:]])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 4 / len(noise) ** 0.5


def test_another_seed_changes_every_draw():
    one, other = draw(0, 1)[0], draw(0, 1, seed=4)[0]
    assert images_of(one) != images_of(other)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.draws.t, other.draws.t)


def test_a_dataset_smaller_than_a_batch_is_repeated():
    """A batch of 2 x 30 from 23 images contains each image at least twice, in an order that differs between steps."""
    parts = [draw(0, 2, processes=Processes(rank, 2), batch_size=30) for rank in range(2)]
    first, second = ([number for part in parts for number in images_of(part[step])] for step in range(2))
    counts = [first.count(number) for number in range(COUNT)]
    assert len(first) == 60
    assert set(counts) == {2, 3}
    assert first != second


def test_a_dataset_without_images_is_refused():
    with pytest.raises(UsageError, match="no images"):
        steps_per_epoch(0, 12)


def test_errors_of_the_reader_are_raised():
    class Broken(Numbered):
        def moments(self, indices, mirrored):
            raise UsageError("cannot read the image 7")

    with pytest.raises(UsageError, match="image 7"):
        draw(0, 5, source=Broken())


def test_the_parts_of_a_split_batch_form_the_batch():
    (batch,) = draw(0, 1)
    for count in (1, 2, 3, 6):
        parts = batch.split(count)
        assert [len(part.draws.t) for part in parts] == [6 // count] * count
        assert same(concatenate(parts), batch)
    with pytest.raises(ValueError, match="6 cannot be split into 4"):
        batch.split(4)


@pytest.mark.parametrize("count", [2, 3])
def test_conditions_match_their_images_and_draws_are_numbered(count):
    alone = draw(0, 9, condition=NumberedCondition())
    settings = {"condition": NumberedCondition(), "batch_size": 6 // count}
    shares = [draw(0, 9, processes=Processes(rank, count), **settings) for rank in range(count)]
    for step, whole in enumerate(alone):
        assert same(concatenate([share[step] for share in shares]), whole)
        numbers, mirrored, draws, _ = whole.condition.dense[:, :, 0, 0].long().T
        assert numbers.tolist() == images_of(whole)
        assert torch.equal(mirrored, whole.data[:, 0, 0, 1].long())
        assert draws.tolist() == list(range(6 * step, 6 * step + 6))
    without = draw(0, 9)
    assert all(same(a._replace(condition=b.condition), b) for a, b in zip(alone, without, strict=True))
    # A condition changes nothing else.
    assert all(torch.equal(a.condition.labels, b.condition.labels) for a, b in zip(alone, without, strict=True))
    halves = alone[0].split(2)
    assert torch.equal(halves[1].condition.dense, alone[0].condition.dense[3:])
    assert without[0].split(2)[1].condition.dense is None


def test_conditions_are_dropped_at_the_given_rate():
    always, never, often = (
        torch.cat([batch.condition.dense for batch in draw(0, 90, condition=NumberedCondition(), condition_dropout=p)])
        for p in (1.0, 0.0, 0.25)
    )
    assert not always.any()
    hidden = ~often.flatten(1).any(1)
    assert torch.equal(often[~hidden], never[~hidden])
    assert 0.2 < hidden.double().mean() < 0.3  # with 540 images, four standard deviations are 0.07


def test_labels_and_conditions_are_dropped_together():
    for batch in draw(0, 9, condition=NumberedCondition(), condition_dropout=0.4, label_dropout=0.4):
        assert torch.equal(batch.condition.labels == CLASSES, ~batch.condition.dense.flatten(1).any(1))


def streams_of(step=4, seed=3, count=6):
    return StepStreams(seed, step, count, (1, 2, 2), torch.device("cpu"))


def test_a_new_purpose_changes_no_other_stream():
    """Neither the order of the purposes nor the number of calls matters."""
    plain, busy = streams_of(), streams_of()
    for purpose in ("coin", "condition", "another"):
        busy.uniform(purpose)
        busy.normal(purpose)
    for purpose in ("time", "dropout", "coin"):
        assert torch.equal(plain.uniform(purpose), busy.uniform(purpose))
    for purpose in ("noise", "posterior", "condition", "another"):
        assert torch.equal(plain.normal(purpose), busy.normal(purpose))
        assert torch.equal(plain.normal(purpose), plain.normal(purpose))


def test_streams_differ_by_purpose_step_and_seed():
    streams = [streams_of(), streams_of(step=5), streams_of(seed=4)]
    numbers = [each.uniform(purpose) for each in streams for purpose in ("time", "dropout", "coin", "another")]
    assert len({tuple(row.tolist()) for row in numbers}) == len(numbers)


def test_the_original_purposes_keep_their_random_numbers():
    """These purposes share one generator, in this order, so that runs begun with the first version resume exactly."""
    generator = generator_for(3, "step", 4)
    uniform = torch.rand(2, 6, generator=generator)
    normal = [torch.randn(6, 1, 2, 2, generator=generator) for _ in range(3)]
    streams = streams_of()
    assert torch.equal(torch.stack([streams.uniform("time"), streams.uniform("dropout")]), uniform)
    for purpose, expected in zip(("posterior", "noise", "condition"), normal, strict=True):
        assert torch.equal(streams.normal(purpose), expected)


def test_uniform_and_normal_numbers_of_a_purpose_are_independent():
    streams, generator = streams_of(), generator_for(3, "step", 4, "uniform", "coin")
    assert torch.equal(streams.uniform("coin"), torch.rand(6, generator=generator))
    again = generator_for(3, "step", 4, "uniform", "coin")
    assert not torch.equal(streams.normal("coin"), torch.randn(6, 1, 2, 2, generator=again))


def test_the_reading_thread_uses_the_runs_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread())))
    found = read_ahead(lambda step: lambda: step, 0, 3, torch.device("cuda:1"))
    assert [value for _, value in found] == [0, 1, 2]
    ((device, thread),) = chosen
    assert device.index == 1
    assert thread is not threading.current_thread()


def draw_with(path, first=0, last=4, *, source=None, processes=Processes(), batch_size=6, **changes):  # noqa: B008
    """Batches of flow matching with these options."""
    settings = {"num_classes": CLASSES, "label_dropout": 0.2, "device": torch.device("cpu"), "path": path} | changes
    settings = {"objective": OBJECTIVES["flow_matching"].build(path), "batch_size": batch_size, "seed": 3} | settings
    return list(draw_batches(source or Numbered(), PixelSpace(1), first, last, processes=processes, **settings))


def test_plain_batches_are_those_of_the_first_version():
    digest = hashlib.sha256()
    for batch in draw_with(FlowMatchingOptions()):
        for column in (batch.data, batch.noise, *batch.draws, batch.condition.labels):
            digest.update((column.double() * 1000).round().long().numpy().tobytes())
    assert digest.hexdigest() == "25fadf094520c8ecff5773d603000887a93a6d88a4ede9ad2c1016d6188183cf"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_contrasts_do_not_depend_on_the_number_of_processes(count):
    path = FlowMatchingOptions(contrastive_weight=0.3, sigma_min=0.1)
    plain, whole = draw_with(FlowMatchingOptions(sigma_min=0.1)), draw_with(path)
    shares = [draw_with(path, processes=Processes(rank, count), batch_size=6 // count) for rank in range(count)]
    for step, (batch, without) in enumerate(zip(whole, plain, strict=True)):
        assert torch.equal(batch.data, without.data)
        assert torch.equal(batch.noise, without.noise)
        for number, column in enumerate(batch.draws):
            assert torch.equal(torch.cat([share[step].draws[number] for share in shares]), column)
        velocities = 0.9 * batch.noise - batch.data
        images = torch.tensor(images_of(batch))
        for row in range(6):  # the next sample of another class
            other = next(k % 6 for k in range(row + 1, row + 7) if images[k % 6] % CLASSES != images[row] % CLASSES)
            assert torch.equal(batch.draws.other_velocity[row], velocities[other])
        assert torch.equal(batch.draws.contrast, 0.3 * (batch.condition.labels != CLASSES))


def test_contrasted_batches_split_into_parts():
    batch = draw_with(FlowMatchingOptions(contrastive_weight=0.3), last=1)[0]
    parts = batch.split(3)
    assert isinstance(parts[0].draws, TrainingDraws)
    assert torch.equal(torch.cat([part.draws.other_velocity for part in parts]), batch.draws.other_velocity)


@pytest.mark.parametrize("count", [1, 2])
def test_with_auxiliary_losses_contrasts_and_features_are_those_of_the_same_samples(count):
    path = FlowMatchingOptions(contrastive_weight=0.3)
    plain = draw_with(path)
    objective = WithAuxiliary(OBJECTIVES["flow_matching"].build(path), {}, routes=True)
    for rank in range(count):
        share = slice(6 // count * rank, 6 // count * (rank + 1))
        found = draw_with(
            path, processes=Processes(rank, count), batch_size=6 // count, objective=objective, features=Numbered()
        )
        for batch, without in zip(found, plain, strict=True):
            for column, expected in zip(batch.draws.base, without.draws, strict=True):
                assert torch.equal(column, expected[share])
            assert torch.equal(batch.draws.features, without.data[share])
            assert batch.draws.routing.shape == (6 // count, *batch.data.shape[2:])


def test_a_dropped_map_has_no_contrast():
    path = FlowMatchingOptions(contrastive_weight=0.3)
    changes = {"condition": NumberedCondition(), "condition_dropout": 0.4, "label_dropout": 0.0}
    drawn = draw_with(path, last=20, **changes)
    dropped = torch.cat([batch.condition.dense.abs().amax((1, 2, 3)) == 0 for batch in drawn])
    assert dropped.any()
    assert torch.equal(torch.cat([batch.draws.contrast for batch in drawn]) == 0, dropped)


def test_optimal_transport_moves_noise_within_classes_and_nothing_else():
    path = FlowMatchingOptions(coupling="optimal_transport")
    source = Numbered(count=60)
    source.labels = source.labels % 2
    plain, coupled = (
        draw_with(p, source=source, batch_size=12, label_dropout=0.5) for p in (FlowMatchingOptions(), path)
    )
    moved = 0
    for one, other in zip(plain, coupled, strict=True):
        assert same(one._replace(noise=other.noise), other)  # data, times and dropped labels
        labels = torch.tensor(images_of(one)) % CLASSES % 2
        for label in (0, 1):
            before, after = (noise[labels == label].flatten(1) for noise in (one.noise, other.noise))
            assert {tuple(row) for row in before.tolist()} == {tuple(row) for row in after.tolist()}
        assert (other.noise - other.data).square().sum() <= (one.noise - one.data).square().sum() + 1e-3
        moved += (one.noise != other.noise).any((1, 2, 3)).sum().item()
    assert moved > 10


class TwoClasses:
    """Images of two classes with known means, 0.75 and 0.25 of all."""

    labels = (torch.arange(400) % 4 == 3).long()

    def __len__(self):
        return 400

    def moments(self, indices, mirrored):
        generator = torch.Generator().manual_seed(0)
        spread = 0.5 * torch.randn(400, 1, 2, 2, generator=generator)[indices]
        return spread + torch.where(self.labels[indices] == 1, 2.0, -1.0).view(-1, 1, 1, 1)


@pytest.mark.parametrize("classes", [1, 2])
def test_the_correction_recovers_the_velocity_from_the_minimum_of_the_contrastive_loss(classes):
    """A network that ignores x_t has a mean velocity for each class: the minimum of the loss is known in closed form."""
    path = FlowMatchingOptions(contrastive_weight=0.4, sigma_min=0.0)
    source = TwoClasses()
    source.labels = source.labels if classes == 2 else 0 * source.labels
    drawn = draw_with(path, last=150, source=source, batch_size=80, num_classes=classes, flips=False)
    data, noise, others, contrast, labels = (
        torch.cat(column)
        for column in zip(
            *((b.data, b.noise, b.draws.other_velocity, b.draws.contrast, b.condition.labels) for b in drawn),
            strict=True,
        )
    )
    means = mean_latents(source, PixelSpace(1), classes, flips=False, device=torch.device("cpu"))
    correction = Correction(0.4, means.float(), null=classes)
    for label in range(classes + 1):
        rows, weights = labels == label, contrast.view(-1, 1, 1, 1)
        target = (noise - data - weights * others)[rows].sum(0) / (1 - weights[rows]).sum(0)
        velocity = (noise - data)[rows].mean(0)
        corrected = correction(target[None], Condition(torch.tensor([label])))[0]
        assert (corrected - velocity).abs().max() < 0.06
        if label < classes and classes == 2:
            assert (target - velocity).abs().max() > 0.5


RECIPE = VariantRecipe(("flip", "crop"), 3, mirrored=False)


def numbered_variants(probability, images=None):
    """A source whose variant k of image i has the number 100 + 3 i + k."""
    variants = Numbered(count=3 * COUNT)
    moments = variants.moments
    variants.moments = lambda indices, mirrored: moments(indices + 100, mirrored)
    return AugmentedMoments(images or Numbered(), variants, RECIPE, probability)


def test_variants_bring_their_parameters():
    table = RECIPE.parameters(COUNT)
    numbers, plain = [], draw(0, 6, flips=True)
    for batch, other in zip(draw(0, 6, source=numbered_variants(0.5), flips=True), plain, strict=True):
        for number, image, parameters in zip(
            images_of(batch), images_of(other), batch.condition.augmentation, strict=True
        ):
            numbers.append(number)
            if number < 100:
                assert number == image
                assert parameters.count_nonzero() == 0
            else:
                assert (number - 100) // 3 == image
                assert torch.equal(parameters, table[number - 100])
        assert torch.equal(batch.condition.labels, other.condition.labels)
        assert torch.equal(batch.noise, other.noise)
        assert torch.equal(batch.draws.t, other.draws.t)
        is_variant = torch.tensor(images_of(batch)) >= 100
        mirrored = batch.data[:, 0, 0, 1] > 0
        assert torch.equal(mirrored, (other.data[:, 0, 0, 1] > 0) & ~is_variant)
    assert 8 < sum(number >= 100 for number in numbers) < 28


def test_without_a_chance_of_variants_the_data_are_the_same_bits():
    for batch, plain in zip(draw(0, 6, source=numbered_variants(0.0)), draw(0, 6), strict=True):
        assert batch.condition.augmentation.count_nonzero() == 0
        assert plain.condition.augmentation is None
        assert same(batch._replace(condition=batch.condition._replace(augmentation=None)), plain)


def test_processes_share_out_variants_and_every_start_draws_the_same():
    whole = draw(0, 6, source=numbered_variants(0.5))
    assert all(map(same, draw(3, 6, source=numbered_variants(0.5)), whole[3:]))
    shares = [draw(0, 6, source=numbered_variants(0.5), processes=Processes(rank, 2), batch_size=3) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert same(concatenate([share[step] for share in shares]), batch)


def test_contrasts_and_null_conditions_know_the_augmentation():
    """Other samples of a contrast may be variants, whose parameters the network does not get."""
    path = FlowMatchingOptions(contrastive_weight=0.1)
    (batch,) = draw(0, 1, source=numbered_variants(1.0), path=path)
    assert batch.condition.augmentation.shape == (6, 4)
    assert min(images_of(batch)) >= 100
    options = OBJECTIVES["mean_flow"].options(target_omega=0.5)
    objective = OBJECTIVES["mean_flow"].build(options)
    settings = {"num_classes": CLASSES, "label_dropout": 0.2, "device": torch.device("cpu"), "batch_size": 6}
    (batch,) = draw_batches(numbered_variants(1.0), PixelSpace(1), 0, 1, objective=objective, path=options, **settings)
    assert torch.equal(batch.draws.null.augmentation, batch.condition.augmentation)
    assert batch.draws.null.labels.tolist() == [CLASSES] * 6
