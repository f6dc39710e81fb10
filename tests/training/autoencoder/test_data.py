import pytest
import torch

from models.autoencoders.pixels import images_to_pixels
from options import UsageError
from runtime.distributed import Processes
from runtime.randomness import StepDraws
from tests.training.autoencoder.small_images import blobs, dataset_of
from training.autoencoder import data as module
from training.autoencoder.augmentation import AUGMENTATIONS, augment
from training.autoencoder.data import RememberedImages, choose_channels, padding, pixel_batches


def batches(dataset, size=5, first=0, last=6, processes=Processes(), augmentations=(), channels=1):  # noqa: B008
    found = pixel_batches(
        RememberedImages(dataset), channels=channels, augmentations=augmentations, batch_size=size, first_step=first,
        last_step=last, seed=0, device=torch.device("cpu"), processes=processes,
    )  # fmt: skip
    return list(found)


def numbered(count):
    return torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(-1, 1, 8, 8)


def test_every_epoch_is_a_different_permutation_of_all_images():
    pixels = [batch.pixels[:, 0, 0, 0] for batch in batches(dataset_of(numbered(10)))]
    epochs = [torch.cat(pixels[first : first + 2]) for first in (0, 2, 4)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, images_to_pixels(numbered(10))[:, 0, 0, 0])
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_batches_depend_on_the_step_and_not_on_earlier_ones_or_the_number_of_processes():
    dataset, names = dataset_of(blobs(20)), tuple(AUGMENTATIONS)
    whole = batches(dataset, augmentations=names)
    later = batches(dataset, first=3, augmentations=names)
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(whole[3:], later, strict=True))
    halves = [batches(dataset, size=2, processes=Processes(rank, 2), augmentations=names, last=2) for rank in range(2)]
    both = batches(dataset, size=4, last=2, augmentations=names)
    for step, batch in enumerate(both):
        assert torch.equal(torch.cat([half[step].pixels for half in halves]), batch.pixels)
        noise = [half[step].draws.normal("posterior", (2, 3)) for half in halves]
        assert torch.equal(torch.cat(noise), batch.draws.normal("posterior", (2, 3)))


@pytest.mark.parametrize(("flips", "names"), [(False, ()), (True, ()), (False, ("flip",))])
def test_images_are_mirrored_if_the_dataset_or_the_option_says_so(flips, names):
    image = blobs(1)
    (batch,) = batches(dataset_of(image.expand(100, -1, -1, -1), flips), 100, last=1, augmentations=names)
    pixels = images_to_pixels(image)
    plain, mirrored = ((batch.pixels == other).flatten(1).all(1) for other in (pixels, pixels.flip(3)))
    assert (plain | mirrored).all()
    assert (25 < mirrored.sum() < 75) if flips or names else (mirrored.sum() == 0)


def test_shifts_move_whole_images_by_up_to_an_eighth():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    pixels = torch.stack([y, x]).expand(300, -1, -1, -1) / 8 - 1
    found = augment(pixels, ("crop",), StepDraws(0, 0, slice(0, 300), 300))
    moves = {tuple((8 * (found - pixels))[number, :, 8, 8].tolist()) for number in range(300)}
    assert moves == {(float(a), float(b)) for a in range(-2, 3) for b in range(-2, 3)}
    assert torch.equal(found[0, 0].diff(dim=0)[4:12].unique(), torch.tensor([0.125]))


def test_recolored_images_stay_in_range_and_differ():
    pixels = 2 * torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
    found = augment(pixels, ("color",), StepDraws(0, 0, slice(0, 50), 50))
    assert found.abs().max() <= 1
    assert 0.02 < (found - pixels).abs().mean() < 0.3
    assert torch.equal(augment(pixels, (), StepDraws(0, 0, slice(0, 50), 50)), pixels)


def test_images_are_read_once_while_they_fit(monkeypatch):
    read, images = [], blobs(3)
    dataset = dataset_of(images)
    dataset._read = lambda index: read.append(index) or images[index]
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 2 * images[0].nbytes)
    remembered = RememberedImages(dataset)
    for _ in range(2):
        assert all(torch.equal(remembered[index], images[index]) for index in range(3))
    assert read == [0, 1, 2, 2]


@pytest.mark.parametrize(("channels", "wanted"), [(1, 2), (3, 1), (3, 4)])
def test_impossible_channels_are_refused(channels, wanted):
    with pytest.raises(UsageError, match=f"--image_channels {wanted} does not fit images with {channels}"):
        choose_channels(dataset_of(blobs(2, channels=channels)).facts, wanted)


def test_padding_is_half_of_what_was_added():
    assert padding(dataset_of(blobs(2), crop=4).facts) == 2
    assert padding(dataset_of(blobs(2)).facts) == 0
