"""Signals: SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP) ask a run to save and stop."""
import os
import signal
import time

# A launcher passes on the signal that it got, and the system may have sent that signal to every
# process already: one request then arrives two or three times.
ONE_REQUEST_SECONDS = 1.0
# Schedulers (Slurm, systemd) repeat SIGTERM for seconds. No person does.
SCHEDULER_SECONDS = 10.0


class Stop:
    """Notes the first request to stop, so that the training loop can finish its step and save.

    asked: True once a signal came. training: the loop sets this to True when there is something to
    save; before that, the first signal raises KeyboardInterrupt in the main thread.

    A second request ends the process at once, by the signal's default action. These are repeats of
    the first request and are ignored:

        any signal within 1 second of the first             a launcher passed the same request on
        SIGTERM or SIGHUP within 10 seconds of a SIGTERM     a scheduler repeated its request
        or SIGHUP that came first

    Ctrl-C under torchrun: torchrun (2.9 to 2.13) starts each process in a session of its own, so
    the terminal sends SIGINT to torchrun alone. torchrun passes SIGINT on once. On a second Ctrl-C
    it sends SIGTERM. So SIGTERM after SIGINT is a person's second Ctrl-C and ends the process.
    """

    def __init__(self):
        self.asked = self.training = False
        self._first_signal, self._first_time = None, 0.0
        self._handlers_before = {}

    def listen(self) -> None:
        """Install the handlers. Only the main thread may call this (ValueError elsewhere)."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # nohup has it ignored
            numbers.append(signal.SIGHUP)
        self._handlers_before = {n: signal.signal(n, self._handle) for n in numbers}

    def restore(self) -> None:
        """Give the signals back to the handlers that listen() replaced.

        After a request to stop the handlers stay: the process is about to end, and a repeat of the
        request must not change its exit status.
        """
        if self.asked:
            return
        for number, handler in self._handlers_before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers_before = {}

    def heard_elsewhere(self) -> None:
        """The request reached another process of the run, and this one ends with it.

        What comes here later, within seconds, is the same request.
        """
        if not self.asked:
            self.asked = True
            self._first_signal, self._first_time = signal.SIGTERM, time.monotonic()

    def _handle(self, number, frame) -> None:
        if self.asked:
            if not self._repeats_first(number):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked = True
        self._first_signal, self._first_time = number, time.monotonic()
        if not self.training:
            # Code that skips bad rows catches Exception. KeyboardInterrupt is none, so it gets out.
            raise KeyboardInterrupt(
                "stopped by a signal before training began; there was nothing to save")

    def _repeats_first(self, number) -> bool:
        """Is this signal the first request once more?"""
        seconds = time.monotonic() - self._first_time
        from_person = signal.SIGINT in (number, self._first_signal)
        return seconds < (ONE_REQUEST_SECONDS if from_person else SCHEDULER_SECONDS)
