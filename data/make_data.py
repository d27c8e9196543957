"""Write the embedded data set: short chats whose last answer is worked out step by step.

    python data/make_data.py            # writes train.jsonl and heldout.jsonl beside this file

The script is deterministic: it writes the same bytes on every machine. A row is in TRL's
conversational preference format: `prompt`, `chosen` and `rejected` are lists of messages. It also
carries a `check`, a regular expression. A response is right when the check matches the same strings
in it as in the chosen response, in the same order. So every intermediate step counts, not only the
last number. The wording of an answer is fixed: where two answers to a prompt differ, one of them is
wrong. So `rejected` is always worse than `chosen`, and so is every rewrite that differs from it.
"""
import json
import random
from collections.abc import Callable
from itertools import cycle
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
# answer(wrong); and in how many steps a mistake can be made. answer(wrong) writes the worked answer
# with a mistake in step `wrong`, counted from 0 (-1: no mistake). The steps after a mistake go on
# from the wrong value.
Question = tuple[list[str], Callable[[int], str], int]


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

    def answer(wrong: int) -> str:
        total, lines = numbers[0], []
        for step, n in enumerate([*numbers[1:], late]):
            result = total + n if step != wrong else slip(rng, total + n)
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

    def answer(wrong: int) -> str:
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

    def answer(wrong: int) -> str:
        total, lines = 0, []
        for step, (g, n, p) in enumerate(zip(goods, counts, prices, strict=True)):
            cost = n * p if 2 * step != wrong else slip(rng, n * p)
            result = total + cost if 2 * step + 1 != wrong else slip(rng, total + cost)
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

    def answer(wrong: int) -> str:
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

    def answer(wrong: int) -> str:
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

    def answer(wrong: int) -> str:
        total, lines = 0, []
        for step, word in enumerate(words):
            back = list(word[::-1])
            if step == wrong:
                i = rng.randrange(len(back) - 1)
                if back[i] == back[i + 1]:
                    back.pop(i)
                else:
                    back[i], back[i + 1] = back[i + 1], back[i]
            total += len(back)
            lines.append(f"{word}: {' '.join(back)}, {total}")
        return "\n".join([*lines, f"Letters: {total}"])
    return chat, answer, 3


# Spelling is easy, so it comes half as often as each of the others.
FAMILIES = [*[running_sum, money_left, shopping, sorting, weekdays] * 2, letters]


def make_row(rng: random.Random) -> dict:
    """One row: a chat of two or three user turns, the right answer, a wrong one, and the check."""
    chat, answer, steps = rng.choice(FAMILIES)(rng)
    roles = cycle(["user", "assistant"])
    chosen, rejected = answer(-1), answer(rng.randrange(steps))
    while rejected == chosen:
        rejected = answer(rng.randrange(steps))
    return {"prompt": [{"role": role, "content": content}
                       for role, content in zip(roles, chat, strict=False)],      # roles: endless
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "check": r"\w+"}


def main() -> None:
    rng = random.Random(20405830)
    seen, rows = set(), []
    while len(rows) < TRAIN_ROWS + HELDOUT_ROWS:
        row = make_row(rng)
        key = json.dumps(row["prompt"])
        if key not in seen:
            seen.add(key)
            rows.append(row)
    for name, part in [("train", rows[:TRAIN_ROWS]), ("heldout", rows[TRAIN_ROWS:])]:
        with open(FOLDER / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as f:
            f.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in part)


if __name__ == "__main__":
    main()
