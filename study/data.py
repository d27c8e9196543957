"""Write the rows of the study into study/data, by data/make_data.py.

    python study/data.py            # what is missing, in about 13 s on one core

No prompt is in two of these files, nor in data/train.jsonl or data/heldout.jsonl. Other programs
call prepare() first.
"""
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "study" / "data"

# name -> flags of data/make_data.py. Each file leaves out the prompts of those above it.
FILES = {
    "tune.jsonl": ["--rows", "1000", "--seed", "1"],        # held out: settings are chosen on these
    "report.jsonl": ["--rows", "2000", "--seed", "2"],      # held out: the tables report these
    "train-40000.jsonl": ["--rows", "40000", "--seed", "3"],
    "no-carry-16000.jsonl": ["--rows", "16000", "--seed", "4", "--no_carry", "0.5"],
    # For free-wording: tuning, tables, the rows of its base, and those that a method trains on. For
    # no-habit the same, but for those of its base.
    "free-tune.jsonl": ["--rows", "1000", "--seed", "5", "--free_wording"],
    "free-report.jsonl": ["--rows", "2000", "--seed", "6", "--free_wording"],
    "free-no-carry-16000.jsonl": ["--rows", "16000", "--seed", "7", "--no_carry", "0.5",
                                  "--free_wording"],
    "free-train.jsonl": ["--rows", "1000", "--seed", "8", "--free_wording"],
    "free-16000.jsonl": ["--rows", "16000", "--seed", "9", "--free_wording"]}


def commands(folder: Path = FOLDER) -> dict[Path, list[str]]:
    """For each file, the command that writes it."""
    files = [folder / name for name in FILES]
    return {file: [sys.executable, str(REPOSITORY / "data" / "make_data.py"), *flags, "--out",
                   str(file), *(word for above in files[:i] for word in ("--avoid", str(above)))]
            for i, (file, flags) in enumerate(zip(files, FILES.values(), strict=True))}


def prepare(folder: Path = FOLDER) -> None:
    """Write the files that are not there. Exits with the sentence of make_data.py where it can't.

    A file has its name only when it is complete, so this can be stopped and called again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, command in commands(folder).items():
        if not file.exists():
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(done.stderr.strip())


if __name__ == "__main__":
    prepare()
