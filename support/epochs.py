"""--save_every_epoch: at which steps the policy is saved, and under which number."""
from pathlib import Path

from support.files import remove_tree
from support.optim import spin_round
from support.settings import Settings


def ends_epoch(s: Settings, rows: int, step: int, steps: int) -> bool:
    """Does a pass over the `rows` examples end with this step?

    In SPIN passes are counted from the start of the round, and the last one ends with the round.

        batch_size 4, 10 rows  ->  steps 3, 5, 8, 10, ...
    """
    _, round_steps = spin_round(s, step, steps)
    done = (step - round_steps.start + 1) * s.batch_size
    ends_round = s.iterations > 1 and step == round_steps.stop - 1
    return done // rows > (done - s.batch_size) // rows or ends_round


def epochs_ended(s: Settings, rows: int, step: int, steps: int) -> int:
    """How many epochs have ended with this step: the number of the newest folder epochs/N."""
    return sum(ends_epoch(s, rows, earlier, steps) for earlier in range(1, step + 1))


def remove_later_epochs(run: Path, ended: int) -> None:
    """Remove RUN/epochs/N for each N above `ended`, which the run will write again."""
    for path in (run / "epochs").glob("*"):
        number = path.name.removesuffix(".partial")
        if number.isdecimal() and (int(number) > ended or path.suffix):
            remove_tree(path)
