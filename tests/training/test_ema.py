import io

import pytest
import torch
from torch import nn

from training.ema import Ema


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def walk(net, generator):
    """Change weights and buffers the way a training step does."""
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
            else:
                value.add_(1)


def test_the_first_update_replaces_most_of_the_initial_value():
    net = network()
    ema = Ema(net, 0.9999)
    initial = {name: value.clone() for name, value in ema.weights.items()}
    walk(net, torch.Generator().manual_seed(0))
    ema.update(net)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ema.weights[name], initial[name] * 2 / 11 + value * 9 / 11)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_ema_is_the_weighted_sum_of_all_steps(decay):
    net, generator = network(), torch.Generator().manual_seed(0)
    ema = Ema(net, decay)
    history = [net[0].weight.detach().double().clone()]
    for _ in range(30):
        walk(net, generator)
        ema.update(net)
        history.append(net[0].weight.detach().double().clone())
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, 31)]
    expected, remaining = torch.zeros_like(history[0]), 1.0
    for value, factor in zip(reversed(history[1:]), reversed(decays), strict=True):
        expected += remaining * (1 - factor) * value
        remaining *= factor
    expected += remaining * history[0]
    torch.testing.assert_close(ema.weights["0.weight"].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_ema_of_a_constant_network_is_that_network():
    net = network()
    ema = Ema(net, 0.999)
    for _ in range(5):
        ema.update(net)
    assert all(torch.equal(ema.weights[name], value) for name, value in net.state_dict().items())


def test_decay_zero_copies_the_network():
    net, generator = network(), torch.Generator().manual_seed(0)
    ema = Ema(net, 0.0)
    for _ in range(3):
        walk(net, generator)
        ema.update(net)
        assert all(torch.equal(ema.weights[name], value) for name, value in net.state_dict().items())


def test_the_ema_network_computes_with_the_ema_weights():
    net = network()
    ema = Ema(net, 0.9)
    x = torch.randn(5, 3)
    walk(net, torch.Generator().manual_seed(0))
    net[1].running_var.abs_()
    ema.update(net)
    loaded = network(seed=1).eval()
    loaded.load_state_dict(ema.weights)
    assert torch.equal(ema.network(x), loaded(x))
    assert not torch.equal(ema.network(x), net.eval()(x))
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())


def test_integer_buffers_are_copied():
    net = network()
    ema = Ema(net, 0.9)
    net[1].num_batches_tracked.fill_(17)
    ema.update(net)
    assert ema.weights["1.num_batches_tracked"] == 17


def test_the_trained_network_is_not_changed():
    net = network()
    ema = Ema(net, 0.9)
    walk(net, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ema.update(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_keep_masks_the_update():
    net, twin = network(), network()
    masked, plain = Ema(net, 0.9), Ema(twin, 0.9)
    initial = masked.weights["0.weight"].clone()
    walk(net, torch.Generator().manual_seed(0))
    walk(twin, torch.Generator().manual_seed(0))
    masked.update(net, keep=torch.tensor(0.0))
    assert torch.equal(masked.weights["0.weight"], initial)
    plain.update(twin)
    plain.update(twin)
    assert (masked.updates, plain.updates) == (0, 2)  # the warmup counts actual updates
    masked = Ema(network(), 0.9)
    for _ in range(2):
        masked.update(net, keep=torch.tensor(1.0))
    torch.testing.assert_close(masked.weights["0.weight"], plain.weights["0.weight"])


def test_a_restored_ema_continues_bit_for_bit():
    net, generator = network(), torch.Generator().manual_seed(0)
    ema = Ema(net, 0.99)
    for _ in range(4):
        walk(net, generator)
        ema.update(net)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    restored = Ema(network(seed=1), 0.99)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        walk(net, generator)
        ema.update(net)
        restored.update(net)
    assert restored.updates == 8
    assert all(torch.equal(restored.weights[name], value) for name, value in ema.weights.items())


@pytest.mark.parametrize("other", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))])
def test_state_of_another_network_is_refused(other):
    with pytest.raises(RuntimeError, match="state_dict"):
        Ema(network(), 0.9).load_state_dict(Ema(other, 0.9).state_dict())
