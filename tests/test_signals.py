"""Tests of support/signals.py: what counts as one request to stop, and what ends a run at once."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import forked, status_of

from support import signals
from support.signals import Stop

REPOSITORY = Path(__file__).resolve().parent.parent
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

# A run without a model: it waits for a signal, takes some time to save, and exits with 3.
PROGRAM = """
import os, sys, time
from pathlib import Path
from support.signals import Stop
folder, saving, training = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "training"
rank = os.environ.get("RANK", "0")
stop = Stop()
stop.listen()
stop.training = training
(folder / f"pid{rank}").write_text(str(os.getpid()))
(folder / f"ready{rank}").touch()
try:
    while not stop.asked:
        time.sleep(0.01)
    (folder / f"asked{rank}").touch()
    end = time.monotonic() + saving
    while time.monotonic() < end:
        time.sleep(0.01)
    (folder / f"saved{rank}").touch()
except KeyboardInterrupt as error:
    print(error, file=sys.stderr)
    end = time.monotonic() + saving
    while time.monotonic() < end:
        time.sleep(0.01)
finally:
    stop.restore()
sys.exit(3)
"""


@pytest.fixture
def start(tmp_path):
    """Starts PROGRAM and waits until it (both of it, under torchrun) listens for signals."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started = []

    def start(saving, training="training", launcher=(), processes=1):
        process = subprocess.Popen(
            [sys.executable, *launcher, str(program), str(tmp_path), str(saving), training],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(HUP, signal.SIG_DFL))
        started.append(process)
        wait_for([tmp_path / f"ready{rank}" for rank in range(processes)], process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(files, process, seconds=60):
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("first, second, seconds, ignored", [
    (TERM, TERM, 0.01, True),       # a scheduler signals every process, and the launcher passes on
    (TERM, TERM, 9.9, True),
    (TERM, TERM, 10.1, False),
    (TERM, HUP, 3, True),           # systemd sends both
    (HUP, TERM, 3, True),
    (INT, INT, 0.01, True),         # a terminal signals all, and the launcher passes on
    (INT, TERM, 0.01, True),
    (INT, INT, 1.1, False),         # a second Ctrl-C
    (INT, TERM, 1.1, False),        # a second Ctrl-C as torchrun passes it on
    (TERM, INT, 1.1, False),        # a person who does not want to wait for the scheduler
])
def test_which_signals_are_one_request(first, second, seconds, ignored, monkeypatch):
    """Each row of the table in Stop's docstring, up to the limits of its times."""
    sent, now = [], [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.signal, "signal", lambda *to: sent.append(to))
    monkeypatch.setattr(signals.os, "kill", lambda *to: sent.append(to))
    stop = Stop()
    stop.training = True
    stop._handle(first, None)
    assert stop.asked and sent == []
    now[0] += seconds
    stop._handle(second, None)
    assert sent == ([] if ignored else [(second, signal.SIG_DFL), (os.getpid(), second)])


@pytest.mark.parametrize("number", [TERM, INT, HUP])
def test_repeats_do_not_disturb_a_save(number, start, tmp_path):
    """The same request twice, as a scheduler and a launcher send it: the run saves, and exits with
    its own status. The first signal alone would do; the second one killed such runs."""
    process = start(saving=0.5)
    process.send_signal(number)
    wait_for([tmp_path / "asked0"], process)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 3 and (tmp_path / "saved0").exists()


@pytest.mark.parametrize("second", [INT, TERM])
def test_a_second_ctrl_c_ends_at_once(second, start, tmp_path):
    """A second request, later than a launcher's repeat: the process dies of that signal and does
    not finish its save."""
    process = start(saving=60)
    process.send_signal(INT)
    time.sleep(signals.ONE_REQUEST_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(second)
    process.communicate(timeout=10)
    assert process.returncode == -second and not (tmp_path / "saved0").exists()


def test_a_signal_before_training(start):
    """Before training there is nothing to save: the first signal raises KeyboardInterrupt, with a
    sentence, and a repeat while the process leaves does not change its status."""
    process = start(saving=0.3, training="not training")
    process.send_signal(TERM)
    time.sleep(0.1)
    process.send_signal(TERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 3 and said.startswith("stopped by a signal before training began")


def test_a_request_that_another_process_got_counts_here():
    """A process that ends because another one got the signal keeps its handlers: its own copy of
    the signal, which comes a moment later, does not change its exit status."""
    def ends():
        stop = Stop()
        stop.listen()
        stop.training = True
        stop.heard_elsewhere()
        stop.restore()
        os.kill(os.getpid(), TERM)
        time.sleep(0.05)
        sys.exit(3)

    assert status_of(forked(ends)) == 3


def test_handlers_are_given_back():
    """listen() and restore() leave every handler as it was, an ignored SIGHUP (nohup) included;
    an ignored SIGHUP stays ignored while the run listens."""
    before = {number: signal.getsignal(number) for number in (TERM, INT, HUP)}
    try:
        signal.signal(HUP, signal.SIG_IGN)
        stop = Stop()
        stop.listen()
        assert signal.getsignal(HUP) == signal.SIG_IGN
        assert signal.getsignal(TERM) == signal.getsignal(INT) == stop._handle
        stop.restore()
        assert signal.getsignal(HUP) == signal.SIG_IGN
        assert {n: signal.getsignal(n) for n in (TERM, INT)} == {n: before[n] for n in (TERM, INT)}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_a_scheduler_under_torchrun(start, tmp_path):
    """SIGTERM to torchrun and to each of its two processes, as Slurm and systemd send it: torchrun
    passes it on, so each process gets it twice, and both save."""
    process = start(saving=1, launcher=TORCHRUN, processes=2)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"pid{rank}").read_text()), TERM)
    process.send_signal(TERM)
    process.communicate(timeout=60)
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_under_torchrun(presses, start, tmp_path):
    """Ctrl-C at torchrun's terminal: once, and both processes save; a second time, and both end at
    once. torchrun's processes are in sessions of their own, so the terminal reaches it alone."""
    process = start(saving=3 if presses == 1 else 60, launcher=TORCHRUN, processes=2)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert all(os.getsid(pid) != os.getsid(process.pid) for pid in pids)
    process.send_signal(INT)
    wait_for([tmp_path / "asked0", tmp_path / "asked1"], process)
    if presses == 2:
        time.sleep(signals.ONE_REQUEST_SECONDS + 0.2)
        process.send_signal(INT)
    begin = time.monotonic()
    process.communicate(timeout=60)
    saved = [(tmp_path / f"saved{rank}").exists() for rank in (0, 1)]
    assert saved == [presses == 1] * 2 and time.monotonic() - begin < 20
