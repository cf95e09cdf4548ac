"""Signals: raised before training, remembered while it goes on, not obeyed by loader workers."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from potstill.signals import STOPPING, Signalled, Stopped, exit_status
from pretrain.signals import Signals

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = """
    import sys, time
    from torch.utils.data import DataLoader, Dataset
    from pretrain.signals import ignore_in_worker

    class Slow(Dataset):
        def __len__(self): return 200
        def __getitem__(self, item):
            time.sleep(0.005)
            return item

    batches = iter(DataLoader(Slow(), batch_size=None, num_workers=2,
                              worker_init_fn=ignore_in_worker))
    next(batches), next(batches)  # one from each: both are past their start
    print(*(worker.pid for worker in batches._workers), flush=True)
"""


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Whatever a test leaves, the next one finds what was there before."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def start(program: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", STOPPING)
def test_before_training_a_signal_raises_at_once(number: signal.Signals) -> None:
    with pytest.raises(Signalled) as raised, Signals() as signals:
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert raised.value.number == signals.pending == number


@pytest.mark.parametrize("number", STOPPING)
def test_during_training_a_signal_is_remembered(number: signal.Signals) -> None:
    with Signals() as signals, signals.deferred():
        assert signals.pending is None
        os.kill(os.getpid(), number)
        assert until(lambda: signals.pending == number)


def test_the_first_of_two_signals_wins() -> None:
    with Signals() as signals, signals.deferred():
        signals.request(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert signals.pending == signal.SIGTERM


def test_a_signal_is_overdue_until_the_main_thread_asks() -> None:
    with Signals() as signals, signals.deferred():
        assert not signals.is_overdue(0)
        signals.request(signal.SIGTERM)
        time.sleep(0.01)
        assert signals.is_overdue(0) and not signals.is_overdue(10)
        assert signals.pending == signal.SIGTERM
        assert not signals.is_overdue(0)


def test_long_steps_get_twice_their_time_before_a_signal_is_overdue() -> None:
    with Signals() as signals, signals.deferred():
        assert signals.pending is None
        time.sleep(0.2)
        assert signals.pending is None  # a step of 0.2 s
        signals.request(signal.SIGTERM)
        time.sleep(0.3)
        assert not signals.is_overdue(0.01)
        time.sleep(0.15)
        assert signals.is_overdue(0.01)


def test_exit_statuses_are_143_and_130_for_an_interrupt() -> None:
    assert [exit_status(number) for number in STOPPING] == [143, 130, 143]
    stopped = Stopped(signal.SIGUSR1, "all is saved")
    assert (str(stopped), stopped.exit_status) == ("stopped by SIGUSR1; all is saved", 143)


def test_a_signal_that_was_obeyed_leaves_the_process_deaf_to_more() -> None:
    with Signals() as signals, signals.deferred():
        signals.request(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in STOPPING)


def test_without_a_signal_the_handlers_and_threads_are_as_before() -> None:
    before, threads = [signal.getsignal(n) for n in STOPPING], threading.active_count()
    for _ in range(20):
        with Signals() as signals, signals.deferred():
            pass
    assert [signal.getsignal(n) for n in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


BLOCKED = """
    import ctypes, threading, time
    from pretrain.signals import Signals

    def look():
        while signals.pending is None:
            time.sleep(0.01)
        print("seen", int(signals.pending), flush=True)

    with Signals() as signals, signals.deferred():
        threading.Thread(target=look, daemon=True).start()
        print("ready", flush=True)
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second time waits for ever, and no signal ends that
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_signal_is_noticed_while_the_main_thread_waits_in_c() -> None:
    with start(BLOCKED) as process:
        try:
            assert line_of(process) == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGUSR1)
            assert line_of(process) == f"seen {signal.SIGUSR1.value}\n"
        finally:
            process.kill()


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    with start(BLOCKED) as process:
        assert line_of(process) == "ready\n"
        for _ in range(2):  # one Ctrl-C, as `timeout` sends it
            process.send_signal(signal.SIGINT)
        assert line_of(process) == f"seen {signal.SIGINT.value}\n"
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None and "interrupted twice" in process.stderr.read()


def test_loader_workers_live_through_the_launchers_signals() -> None:
    with start(WORKERS + "\n    print(sum(batches), flush=True); time.sleep(60)") as process:
        try:
            workers = [int(pid) for pid in line_of(process).split()]
            for number in STOPPING:
                for pid in workers:
                    os.kill(pid, number)
            assert line_of(process) == f"{sum(range(2, 200))}\n"
        finally:
            process.kill()
    assert until(lambda: not any(map(is_running, workers)), 60)


def test_loader_workers_end_when_their_trainer_is_killed() -> None:
    with start(WORKERS + "\n    time.sleep(60)") as process:
        workers = [int(pid) for pid in line_of(process).split()]
        process.kill()
    assert until(lambda: not any(map(is_running, workers)), 60)


def test_a_trainer_that_ends_is_not_held_up_by_its_workers() -> None:
    with start(WORKERS + "\n    sys.exit(7)") as process:
        workers = [int(pid) for pid in line_of(process).split()]
        assert process.wait(60) == 7
    assert until(lambda: not any(map(is_running, workers)))
