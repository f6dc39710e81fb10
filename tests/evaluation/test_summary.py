import pickle

import numpy as np
import pytest
import torch

from evaluation.summary import GROUPS, Gatherer
from options import UsageError
from tests.fake_features import Pixels

IMAGES = torch.randint(256, (100, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def gathered(parts: list[torch.Tensor], **options) -> Gatherer:
    gatherer = Gatherer(Pixels(), ["moments", "rows"], **options)
    for indices in parts:
        gatherer.update(IMAGES[indices], indices.tolist())
    return gatherer


def test_rows_are_ordered_by_index():
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    for grouped in (False, True):
        summary = gathered(list(order.split(13)), grouped=grouped).summary()
        assert torch.equal(summary.rows, Pixels().features(IMAGES))
        assert summary.count == 100
    kept = gathered(list(order.split(13)), keep=torch.tensor([70, 3])).summary()
    assert torch.equal(kept.rows, Pixels().features(IMAGES[[3, 70]]))
    assert kept.statistics.count == 100


def test_groups_partition_the_rows():
    gatherer = gathered(list(torch.arange(100).split(7)), grouped=True)
    parts = [gatherer.summary({}, [group]) for group in range(GROUPS)]
    assert sum(part.count for part in parts) == 100
    assert len({tuple(row) for part in parts for row in part.rows.tolist()}) == 100
    for part in parts:
        np.testing.assert_allclose(part.statistics.mean, part.rows.double().mean(0), rtol=1e-6)


def test_several_processes_gather_the_same_as_one():
    one = gathered(list(torch.arange(100).split(10)), grouped=True)
    shares = [gathered(list(torch.arange(rank, 100, 3).split(5)), grouped=True).share() for rank in range(3)]
    merged = Gatherer(Pixels(), ["moments", "rows"], grouped=True)
    for share in shares:
        merged.merge(pickle.loads(pickle.dumps(share)))
    for groups in (range(GROUPS), [1, 4]):
        ours, theirs = one.summary({}, groups), merged.summary({}, groups)
        assert (ours.count, ours.meta) == (theirs.count, theirs.meta)
        assert torch.equal(ours.rows, theirs.rows)
        np.testing.assert_allclose(ours.statistics.mean, theirs.statistics.mean, rtol=1e-10)
        np.testing.assert_allclose(ours.statistics.covariance, theirs.statistics.covariance, rtol=1e-10, atol=1e-16)


def test_an_output_that_the_network_lacks_is_refused_before_any_image():
    with pytest.raises(
        UsageError, match="the feature network pixels has no output logits or spatial, .*--features inception"
    ):
        Gatherer(Pixels(), ["moments", "spatial", "logits"])


def test_only_the_outputs_needed_are_computed():
    class Recording(Pixels):
        def __init__(self):
            self.outputs, self.asked = {"features": 3, "logits": 5}, []

        def __call__(self, images, outputs):
            self.asked.append(set(outputs))
            return super().__call__(images, outputs)

        def logits(self, images):
            return torch.zeros(len(images), 5)

    network = Recording()
    for needs in (["moments", "rows"], ["logits"], ["rows", "logits"]):
        Gatherer(network, needs).update(IMAGES)
    assert network.asked == [{"features"}, {"logits"}, {"features", "logits"}]
