import signal

import pytest

from runtime.processes.signals import StopSignals


@pytest.fixture
def record():
    """The signals received by the handler that was installed before the test."""
    arrived = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_a_request_to_stop(number):
    with StopSignals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested


def test_handlers_are_restored(record):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(ValueError, match="inside"), StopSignals():
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    signal.raise_signal(signal.SIGUSR1)
    assert record == [signal.SIGUSR1]


def test_second_interrupt_stops_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in background jobs
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_calls_the_previous_handler(record):
    with StopSignals():
        signal.raise_signal(signal.SIGUSR1)
        assert record == []
        signal.raise_signal(signal.SIGUSR1)
        assert record == [signal.SIGUSR1]


def test_a_second_signal_is_expected_with_several_processes(record):
    with StopSignals(once=False) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
    assert record == []


def test_the_first_signal_says_what_happens_next(capfd):
    with StopSignals(once=False, text="stopping soon"):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "\nstopping soon\n"
