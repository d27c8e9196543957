"""Checks: a regular expression that tells whether a response is right.

The regular expressions are those of the `regex` package, which comes with transformers and reads
Python's syntax. A pattern comes from a data file, so nobody has vouched for it: a search ends after
TIME_LIMIT seconds, and a pattern that would fill the memory is refused before it is compiled.
"""
import re

import regex

from support.errors import UserError, printable

TIME_LIMIT = 1.0                # seconds per search
LARGEST_PATTERN = 20_000        # characters, counted as often as they are repeated


def matches_check(check: str, response: str, chosen: str, time_limit: float = TIME_LIMIT) -> bool:
    """Does the check find in `response` what it finds in the chosen response?

    All matches count, in their order: every step of a worked answer, not the last number alone.
    A search that takes longer than `time_limit` seconds counts as not matched.

        check "[0-9]+", chosen "2+3=5", response "2 + 3 = 5."  ->  True
        check "[0-9]+", chosen "2+3=5", response "2 + 3 = 6."  ->  False
    """
    try:
        expected = regex.findall(check, chosen, timeout=time_limit)
        return regex.findall(check, response, timeout=time_limit) == expected
    except TimeoutError:
        return False


def validate_check(check, chosen: str, where: str, time_limit: float = TIME_LIMIT) -> None:
    """Raise UserError unless `check` is a regular expression that searches `chosen` in time.

    where: the place of the row, as in "file, line 3".
    """
    if not isinstance(check, str):
        raise UserError(f"{where}: `check` is not a regular expression but {type(check).__name__}")
    if expanded_length(check) > LARGEST_PATTERN:
        raise UserError(f"{where}: `check` is too large: more than {LARGEST_PATTERN:,} characters "
                        "with its repetitions written out")
    try:
        regex.findall(check, chosen, timeout=time_limit)
    except TimeoutError:
        raise UserError(f"{where}: `check` takes longer than {time_limit:g} s to search the chosen "
                        "response; write it without repetitions inside repetitions") from None
    except RecursionError:
        raise UserError(f"{where}: `check` is not a regular expression (brackets are nested "
                        "too deeply)") from None
    except (regex.error, ValueError, OverflowError, IndexError, KeyError) as error:
        raise UserError(f"{where}: `check` is not a regular expression "
                        f"({printable(str(error))})") from None


def expanded_length(pattern: str) -> int:
    """The length of a pattern with its repetitions written out, as the regex package compiles them.

        "ab{3}"  ->  4          "(?:ab{3}){10}"  ->  80, its brackets included
    """
    escape, char_set = r"\\.", r"\[\^?\]?(?:\\.|[^\]\\])*\]"
    repetition = r"\{(?P<least>\d+)(?:,\d*)?\}"
    parts = re.finditer(f"{escape}|{char_set}|{repetition}|.", pattern, re.DOTALL)
    open_groups, last = [0], 0      # lengths of the open groups; length of what a {n} repeats
    for part in parts:
        if part["least"]:
            repeated = last * max(int(part["least"][:9]), 1)
            open_groups[-1] += repeated - last
            last = repeated
        elif part[0] == "(":
            open_groups.append(1)
        elif part[0] == ")" and len(open_groups) > 1:
            last = open_groups.pop() + 1
            open_groups[-1] += last
        else:
            last = len(part[0])
            open_groups[-1] += last
    return sum(open_groups)
