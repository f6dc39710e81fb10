import subprocess
import sys
from pathlib import Path

import pytest

from runtime.randomness import generator_for, seed_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("one", "other"), [((1, 23), (12, 3)), ((1,), ("1",)), ((1, 2), (2, 1)), (("a",), ("a", 0))])
def test_different_keys_give_different_seeds(one, other):
    assert seed_for(*one) != seed_for(*other)


def test_the_seed_is_valid_and_the_same_in_another_process():
    command = [sys.executable, "-c", "from runtime.randomness import seed_for; print(seed_for(7, 'noise', 3))"]
    other = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert int(other) == seed_for(7, "noise", 3)
    seeds = [seed_for(index) for index in range(1000)]
    assert 2**62 < max(seeds) < 2**63
    assert min(seeds) >= 0
    assert generator_for(7, "noise", 3).initial_seed() == seed_for(7, "noise", 3)
