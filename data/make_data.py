"""Write the embedded data set: short chats whose last answer is worked out step by step.

    python data/make_data.py                                # train.jsonl, heldout.jsonl beside this
    python data/make_data.py --rows 40000 --out more.jsonl          # other rows of the same kind
    python data/make_data.py --rows 1000 --seed 1 --out test.jsonl --avoid more.jsonl

The script is deterministic: it writes the same bytes on every machine. A row is in TRL's
conversational preference format: `prompt`, `chosen` and `rejected` are lists of messages. It also
carries a `check`, a regular expression. A response is right when the check matches the same strings
in it as in the chosen response, in the same order. So every intermediate step counts, not only the
last number. The wording of an answer is fixed: where two answers to a prompt differ in a word or a
number, one of them is wrong. So `rejected` is always worse than `chosen`, and so is nearly every
rewrite that differs from it: the check does not see signs and spaces.
With --free_wording, answers that say the same in other words are right as well. Their check leaves
out every word that PHRASINGS has, wherever it stands, so a garbled phrase passes.

--rows N      as many other rows as asked, written one at a time. No prompt comes twice, and none is
              in train.jsonl or heldout.jsonl beside this file
--out FILE    where they go. The file gets its name when it is complete
--seed S      another seed, other rows (0)
--avoid FILE  leave out the prompts of this file, too; may be given several times
--no_carry P  this share of the rows (0 to 1) adds without carrying, see add_without_carrying. They
              are there to train a base model with a bad habit. Where the habit changes the answer,
              the row has neither `rejected` nor `check`: its `chosen` is itself wrong (0)
--free_wording  the phrases of every answer are drawn from PHRASINGS, `chosen` and `rejected` each
              for itself
--check_wording  with --free_wording: the check counts phrases, too. It matches an answer in each of
              its wordings, and nothing else
"""
import argparse
import hashlib
import json
import operator
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

TRAIN_ROWS, HELDOUT_ROWS = 5000, 600
FOLDER = Path(__file__).parent

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jo", "Kim", "Leo",
         "Mia", "Ned", "Ola", "Pia"]
WORDS = ["apple", "beach", "bread", "candle", "cherry", "cloud", "coffee", "copper", "garden",
         "guitar", "hammer", "island", "jacket", "kettle", "lemon", "mango", "marble", "mirror",
         "needle", "orange", "paper", "pencil", "piano", "planet", "pocket", "rabbit", "river",
         "saddle", "silver", "spoon", "table", "tiger", "tomato", "tunnel", "violin", "wallet",
         "window", "winter", "yellow", "zebra"]
GOODS = ["pens", "cups", "maps", "caps", "jars", "nuts", "figs", "bags", "keys", "mugs", "pans",
         "pots"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

# What a family of questions returns: the messages before the last answer, user first; the function
# answer(wrong, add); and in how many steps a mistake can be made. answer(wrong, add) writes the
# worked answer with a mistake in step `wrong`, counted from 0 (-1: no mistake). Its sums are
# add(a, b). The steps after a mistake go on from the wrong value.
Add = Callable[[int, int], int]
Question = tuple[list[str], Callable[[int, Add], str], int]


def add_without_carrying(a: int, b: int) -> int:
    """The sum of two numbers, each digit for itself.

        57 + 48  ->  95, where 7 + 8 = 15 leaves 5 and 5 + 4 = 9        57 + 41  ->  98, as it is
    """
    if a == b == 0:
        return 0
    return 10 * add_without_carrying(a // 10, b // 10) + (a % 10 + b % 10) % 10


def slip(rng: random.Random, value: int) -> int:
    """A wrong number near `value`, as a person or a small model gets it wrong.

    It is off by 1, 2 or 10. It is negative only where `value` is.
    """
    return value + rng.choice([-10, -2, -1, 1, 2, 10] if value > 10 else [1, 2, 10])


def running_sum(rng: random.Random) -> Question:
    """Numbers from two turns are added up one at a time."""
    numbers = [rng.randint(3, 59) for _ in range(rng.choice([3, 4]))]
    late = rng.randint(3, 59)
    listed = ", ".join(map(str, numbers))
    chat = [f"My numbers are {listed}.", f"You have {len(numbers)} numbers.",
            f"Put {late} at the end. Then add them all up."]

    def answer(wrong: int, add: Add) -> str:
        total, lines = numbers[0], []
        for step, n in enumerate([*numbers[1:], late]):
            result = add(total, n) if step != wrong else slip(rng, add(total, n))
            lines.append(f"{'then' if step else 'first'} {total} + {n} = {result}")
            total = result
        return "\n".join([*lines, f"Sum: {total}"])
    return chat, answer, len(numbers)


def money_left(rng: random.Random) -> Question:
    """What is left of a purse after three purchases, in three turns."""
    name, purse = rng.choice(NAMES), rng.randint(120, 250)
    spent = [rng.randint(3, 39) for _ in range(3)]
    goods = rng.sample(GOODS, 3)
    chat = [f"{name} has {purse} coins and buys {goods[0]} for {spent[0]}.", "Noted.",
            f"Then {goods[1]} for {spent[1]}.", "Noted.",
            f"And {goods[2]} for {spent[2]}. What is left?"]

    def answer(wrong: int, add: Add) -> str:
        left, lines = purse, []
        for step, (thing, cost) in enumerate(zip(goods, spent, strict=True)):
            result = left - cost if step != wrong else slip(rng, left - cost)
            lines.append(f"{thing}: {left} - {cost} = {result}")
            left = result
        return "\n".join([*lines, f"Left: {left}"])
    return chat, answer, 3


def shopping(rng: random.Random) -> Question:
    """Counts times prices, with a running total."""
    name = rng.choice(NAMES)
    goods = rng.sample(GOODS, 3)
    counts, prices = [rng.randint(2, 9) for _ in goods], [rng.randint(2, 12) for _ in goods]
    asked = ", ".join(f"{n} {g}" for n, g in zip(counts, goods, strict=True))
    priced = ", ".join(f"{g} {p}" for g, p in zip(goods, prices, strict=True))
    chat = [f"{name} wants {asked}.", "What are the prices?", f"Each: {priced}. What is the total?"]

    def answer(wrong: int, add: Add) -> str:
        total, lines = 0, []
        for step, (g, n, p) in enumerate(zip(goods, counts, prices, strict=True)):
            cost = n * p if 2 * step != wrong else slip(rng, n * p)
            result = add(total, cost)
            if 2 * step + 1 == wrong:
                result = slip(rng, result)
            lines.append(f"{g}: {n} * {p} = {cost}, total {result}")
            total = result
        return "\n".join([*lines, f"Total: {total}"])
    return chat, answer, 6


def sorting(rng: random.Random) -> Question:
    """Selection sort: each step names the smallest number and those that are left."""
    numbers = rng.sample(range(10, 100), rng.choice([4, 5]))
    late = rng.choice([n for n in range(10, 100) if n not in numbers])
    gone = rng.choice(numbers)
    chat = ["List: " + " ".join(map(str, numbers)), f"Your list has {len(numbers)} numbers.",
            f"Swap {gone} for {late}, then sort it."]
    items = [late if n == gone else n for n in numbers]

    def answer(wrong: int, add: Add) -> str:
        left, done, lines = list(items), [], ["have " + " ".join(map(str, items))]
        while left:
            smallest = min(left)
            if len(done) == wrong and len(left) > 1:
                smallest = sorted(left)[1]
            left.remove(smallest)
            done.append(smallest)
            lines.append(f"least {smallest}, left {' '.join(map(str, left)) or 'none'}")
        return "\n".join([*lines, "Sorted: " + " ".join(map(str, done))])
    return chat, answer, len(items) - 1


def weekdays(rng: random.Random) -> Question:
    """The weekday after several jumps of days, in two turns."""
    name, day = rng.choice(NAMES), rng.randrange(7)
    jumps = [rng.randint(2, 30) for _ in range(3)]
    chat = [f"{name} leaves on a {DAYS[day]} and walks {jumps[0]} days.", "And after that?",
            f"A rest of {jumps[1]} days and {jumps[2]} days back. Which day is it at the end?"]

    def answer(wrong: int, add: Add) -> str:
        now, lines = day, []
        for step, jump in enumerate(jumps):
            then = (now + jump + (rng.choice([1, 6]) if step == wrong else 0)) % 7
            lines.append(f"{DAYS[now]} + {jump} days, or {jump % 7}: {DAYS[then]}")
            now = then
        return "\n".join([*lines, f"Day: {DAYS[now]}"])
    return chat, answer, 3


def letters(rng: random.Random) -> Question:
    """Three words are spelled backwards and their letters are counted."""
    words = rng.sample(WORDS, 3)
    chat = [f"Take {words[0]} and {words[1]}.", "Taken.",
            f"Add {words[2]}. Spell each backwards and count all letters."]

    def answer(wrong: int, add: Add) -> str:
        total, lines = 0, []
        for step, word in enumerate(words):
            back = list(word[::-1])
            if step == wrong:
                i = rng.randrange(len(back) - 1)
                if back[i] == back[i + 1]:
                    back.pop(i)
                else:
                    back[i], back[i + 1] = back[i + 1], back[i]
            total = add(total, len(back))
            lines.append(f"{word}: {' '.join(back)}, {total}")
        return "\n".join([*lines, f"Letters: {total}"])
    return chat, answer, 3


# Spelling is easy, so it comes half as often as each of the others.
FAMILIES = [*[running_sum, money_left, shopping, sorting, weekdays] * 2, letters]

# With free wording, one of the phrases on the right takes the place of the one on the left.
PHRASINGS = {
    " + ": (" + ", " and ", " add "),
    " - ": (" - ", " less "),
    " * ": (" * ", " at "),
    " = ": (" = ", " is ", " are "),
    "first ": ("first ", ""),
    "then ": ("then ", "and ", ""),
    ", total ": (", total ", ", in all "),
    "least ": ("least ", "take "),
    ", left ": (", left ", ", then "),
    ", or ": (", or ", " or ", " are "),
    ": ": (": ", ", "),
    "Sum: ": ("Sum: ", "Total: ", "Sum is "),
    "Left: ": ("Left: ", "Left are "),
    "Total: ": ("Total: ", "Sum: ", "Total is "),
    "Sorted: ": ("Sorted: ", "List: "),
    "Day: ": ("Day: ", "Day is "),
    "Letters: ": ("Letters: ", "Total: ")}
PHRASE = re.compile("|".join(map(re.escape, sorted(PHRASINGS, key=len, reverse=True))))
# What the check of a row counts: every word, or every word that is in no phrase.
EVERY_WORD = r"\w+"
PHRASE_WORDS = sorted({word for phrases in PHRASINGS.values() for phrase in phrases
                       for word in re.findall(EVERY_WORD, phrase)})
CONTENT_WORDS = rf"\b(?!(?:{'|'.join(PHRASE_WORDS)})\b)\w+"


def reword(rng: random.Random, answer: str) -> str:
    """The answer with its phrases drawn anew, each for itself.

        then 41 + 55 = 96  ->  and 41 add 55 = 96        then 41 + 55 = 96  ->  41 and 55 are 96
    """
    return PHRASE.sub(lambda found: rng.choice(PHRASINGS[found[0]]), answer)


def any_wording(answer: str) -> str:
    """A check that finds something in the answer in each of its wordings, and in no other text.

    What it finds is empty: the whole text is looked at from its start.
    """
    parts = re.split(f"({PHRASE.pattern})", answer)
    ways = ("|".join(map(re.escape, PHRASINGS.get(part, (part,)))) for part in parts)
    return r"\A(?=" + "".join(f"(?:{way})" for way in ways) + r"\Z)"


def message(text: str, wording_rng: random.Random | None) -> dict:
    """The text as the assistant's message, reworded where there is a wording_rng."""
    return {"role": "assistant", "content": reword(wording_rng, text) if wording_rng else text}


def make_row(rng: random.Random, habit_rng: random.Random, no_carry: float = 0.0,
             wording_rng: random.Random | None = None, check_wording: bool = False) -> dict:
    """One row: a chat of two or three user turns, the right answer, a wrong one, and the check.

    no_carry: the probability that the answer adds without carrying. habit_rng decides whether it
    does, so that the prompts are the same at any probability. wording_rng: draws the wording of the
    answers (None: it is fixed). check_wording: the check counts phrases, too.
    """
    chat, answer, steps = rng.choice(FAMILIES)(rng)
    roles = cycle(["user", "assistant"])
    chosen, rejected = answer(-1, operator.add), answer(rng.randrange(steps), operator.add)
    while rejected == chosen:
        rejected = answer(rng.randrange(steps), operator.add)
    row = {"prompt": [{"role": role, "content": content}
                      for role, content in zip(roles, chat, strict=False)]}      # roles: endless
    if habit_rng.random() < no_carry:
        habit = answer(-1, add_without_carrying)
        if habit != chosen:
            return row | {"chosen": [message(habit, wording_rng)]}
    check = CONTENT_WORDS if wording_rng else EVERY_WORD
    if check_wording:
        check = any_wording(chosen)
    return row | {"chosen": [message(chosen, wording_rng)],
                  "rejected": [message(rejected, wording_rng)], "check": check}


def digest(row: dict) -> bytes:
    """What stands for a row's prompt in a set of millions of them."""
    return hashlib.blake2b(json.dumps(row["prompt"]).encode(), digest_size=16).digest()


def make_rows(seed: int, avoided: set[bytes], no_carry: float = 0.0,
              free_wording: bool = False, check_wording: bool = False) -> Iterator[dict]:
    """Rows without end, no prompt twice. avoided: digests of prompts that are left out."""
    rng, habit_rng, seen = random.Random(seed), random.Random(f"habit {seed}"), set(avoided)
    wording_rng = random.Random(f"wording {seed}") if free_wording else None
    while True:
        row = make_row(rng, habit_rng, no_carry, wording_rng, check_wording)
        key = digest(row)
        if key not in seen:
            seen.add(key)
            yield row


def write_rows(file: Path, rows: Iterator[dict]) -> None:
    """One JSON object per line. The file appears under its name when it is complete."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    os.replace(partial, file)


def prompts_in(file: Path) -> set[bytes]:
    """Digests of the prompts of a file that this script wrote.

    Raises ValueError, with the line, where there is no prompt.
    """
    found = set()
    with open(file, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                found.add(digest(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"line {number} has no `prompt`") from None
    return found


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line. Exits with a sentence and status 2 on one that makes no sense."""
    parser = argparse.ArgumentParser(
        prog="make_data.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--avoid", type=Path, action="append")
    parser.add_argument("--no_carry", type=float)
    parser.add_argument("--free_wording", action="store_true", default=None)
    parser.add_argument("--check_wording", action="store_true", default=None)
    parser.error = refuse               # one sentence, without the usage
    given = parser.parse_args(arguments)
    if given.rows is None:
        for name, value in vars(given).items():
            if value is not None:
                refuse(f"--{name} needs --rows N: how many rows to write")
        return given
    if given.rows < 1:
        refuse(f"--rows must be at least 1, not {given.rows}")
    if given.out is None:
        refuse("--rows needs --out FILE: where to write the rows")
    if not given.out.parent.is_dir():
        refuse(f"--out {given.out}: there is no folder {given.out.parent}")
    if given.out.is_dir():
        refuse(f"--out {given.out} is a folder; name a file in it")
    if given.no_carry is not None and not 0 <= given.no_carry <= 1:
        refuse(f"--no_carry is a share of the rows, from 0 to 1, not {given.no_carry}")
    if given.check_wording and not given.free_wording:
        refuse("--check_wording needs --free_wording: a fixed wording is always checked")
    return given


def refuse(message: str) -> None:
    print(f"make_data.py: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str]) -> None:
    given = parse_arguments(arguments)
    if given.rows is None:
        rows = make_rows(20405830, set())
        write_rows(FOLDER / "train.jsonl", islice(rows, TRAIN_ROWS))
        write_rows(FOLDER / "heldout.jsonl", islice(rows, HELDOUT_ROWS))
        return
    avoided = set()
    for file in [FOLDER / "train.jsonl", FOLDER / "heldout.jsonl", *(given.avoid or [])]:
        try:
            avoided |= prompts_in(file)
        except (OSError, ValueError) as error:
            refuse(f"{file}: can't read its prompts ({getattr(error, 'strerror', None) or error})")
    try:
        rows = make_rows(given.seed or 0, avoided, given.no_carry or 0.0, bool(given.free_wording),
                         bool(given.check_wording))
        write_rows(given.out, islice(rows, given.rows))
    except OSError as error:
        refuse(f"--out {given.out}: can't write it ({error.strerror})")


if __name__ == "__main__":
    main(sys.argv[1:])
