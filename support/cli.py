"""From a command line to an exit status: errors become one sentence each.

    0  done                         3  stopped by a signal, saved
    2  the user's mistake           4  the run can't go on: disk, memory, numbers, a lost process
"""
import os
import sys
from collections.abc import Callable

from tqdm import tqdm

from support.errors import RowFailed, RunFailed, Stopped, UserError, printable
from support.parallel import leave, lost_process, out_of_memory
from support.plan import plan
from support.settings import Settings, parse
from support.signals import Stop

OUT_OF_MEMORY = ("out of memory; lower --micro_batch (scoring) or --generate_batch (generating), "
                 "pass --grad_checkpoint or --dtype bf16, with several GPUs --shard; --dry_run "
                 "tells beforehand what is needed")


def main(train: Callable[[Settings, Stop], None], argv: list[str]) -> int:
    """Parse the command line, train, and return the exit status.

    Ends the process at once where an error happened on one process alone: the others wait for that
    process, and torchrun ends them.
    """
    status, stop = 0, Stop()
    try:
        stop.listen()
        settings = parse(argv)
        if not settings.dry_run:
            train(settings, stop)
        elif on_rank0():
            report = plan(settings, int(os.environ.get("WORLD_SIZE", 1)))
            print("\n".join(map(printable, report.split("\n"))))
    except (RowFailed, FloatingPointError) as error:
        end_at_once(error)
    except UserError as error:
        status = say(error, error.status)
    except KeyboardInterrupt as error:
        status = say(error, Stopped.status)
    except OSError as error:
        status = say(f"{error.filename or 'the output folder'}: {error.strerror or error}",
                     RunFailed.status)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            end_at_once(OUT_OF_MEMORY)
        if lost_process(error):
            end_at_once("another process of this run is gone; go on from the last checkpoint with "
                        "--resume")
        raise
    finally:
        stop.restore()
    leave()
    return status


def on_rank0() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(error, status: int) -> int:
    """Print on rank 0 what went wrong; returns the exit status."""
    if on_rank0():
        print_sentence(error)
    return status


def end_at_once(error) -> None:
    """Print what went wrong here, and end this process without waiting for the others."""
    print_sentence(error)
    sys.stdout.flush()
    os._exit(RunFailed.status)


def print_sentence(error) -> None:
    """On a line of its own, also where a progress bar stands."""
    tqdm.write(f"train.py: {printable(str(error))}", file=sys.stderr)
    sys.stderr.flush()
