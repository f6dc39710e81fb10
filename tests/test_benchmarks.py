import pytest

from benchmarks._timing import require_agreement

EXPECTED = {"loss": [2.0], "change": [3.0, -4.0]}
TOLERANCES = {"loss": 0.01, "change": 0.05}


def agree(**results):
    require_agreement("side", EXPECTED | results, EXPECTED, TOLERANCES)


def test_variants_with_equal_results_are_accepted():
    agree()
    agree(loss=[2.019], change=[3.0, -4.24])


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"loss": [2.03]}, "side: loss must be within 1 %"),
        ({"change": [-3.0, 4.0]}, "side: change must be within 5 %"),
        ({"change": [3.0, -4.3]}, "side: change must be within 5 %"),
        ({"loss": [float("nan")]}, "side: loss must be within 1 %"),
    ],
)
def test_a_variant_with_different_results_is_refused(results, message):
    with pytest.raises(SystemExit, match=message):
        agree(**results)
