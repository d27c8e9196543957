"""Checks: a regular expression that tells whether a response is right."""
import re


def matches_check(check: str, response: str, chosen: str) -> bool:
    """Is `response` right? It is when the check finds in `response` what the check finds in the chosen response.

    All matches count, in their order: every step of a worked answer, not the last number alone.

        check "[0-9]+", chosen "2+3=5", response "2 + 3 = 5."  ->  True        response "2+3=6"  ->  False
    """
    return re.findall(check, response) == re.findall(check, chosen)
