"""A row's `check`: what it decides, and that no pattern hangs or breaks a run."""
import json
import time

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from support.checks import LARGEST_PATTERN, expanded_length, matches_check, validate_check
from support.errors import UserError
from support.settings import parse
from support.tokenize_rows import RowTokenizer, load_data

SLOW = r"(a|aa)+$"              # twice as many ways for each further letter
SLOW_TEXT = "a" * 60 + "!"


def test_worked_example():
    """matches_check(): every match counts, in order."""
    assert matches_check("[0-9]+", "2 + 3 = 5.", "2+3=5")
    assert not matches_check("[0-9]+", "2+3=6", "2+3=5")
    assert not matches_check("[0-9]+", "3+2=5", "2+3=5")
    assert not matches_check("[0-9]+", "5", "2+3=5")


def test_a_slow_check_counts_as_not_matched():
    """A search that never ends is given up after the time limit, whichever text it is slow on; the
    response then counts as not matched, and nothing is raised."""
    start = time.monotonic()
    assert not matches_check(SLOW, SLOW_TEXT, "aa", time_limit=0.2)
    assert not matches_check(SLOW, "aa", SLOW_TEXT, time_limit=0.2)
    assert time.monotonic() - start < 5


def test_a_slow_check_is_found_before_training(tmp_path, tokenizer):
    """A check that is too slow on its own chosen response is refused when the data is read, with
    the row's place; --skip_bad_rows leaves the row out."""
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": SLOW_TEXT, "check": SLOW}]
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", "m", "--data", str(file), "--eval_rows", "0"]
    row_tokenizer, said = RowTokenizer(tokenizer, 100, 200, use_rejected=False), []
    with pytest.raises(UserError, match="line 2: `check` takes longer than 1 s") as error:
        load_data(parse(flags), row_tokenizer)
    assert "--skip_bad_rows" in str(error.value)
    examples, _ = load_data(parse([*flags, "--skip_bad_rows"]), row_tokenizer, said.append)
    assert len(examples) == 1 and "1 of 2 rows left out" in said[0]


@pytest.mark.parametrize("check", [
    "(", "[", "(" * 3000 + ")" * 3000, "[" * 3000, "(?:" * 900 + "a" + ")" * 900, "a{9,1}",
    "(?P<a", r"\N{no such name}", r"\p{No}such{99999999999999999999}", "((a{1000}){1000}){1000}",
    "a{1000000}", "(?:a|b){1000000}", "a" * 30_000, 5, ["a"], {"a": 1},
])
def test_what_is_no_usable_pattern_gets_one_sentence(check):
    """What is no regular expression, brackets nested beyond any depth, and repetitions that would
    fill the memory: one sentence each, at once, with the row's place."""
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^file, line 3: `check`") as error:
        validate_check(check, "ab", "file, line 3")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("check", [
    r"\w+", r"[0-9]+", r"answer: (?:yes|no)", r"\d{4}-\d{2}-\d{2}", r"(?i)\bsum: (-?\d+)",
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"[^\]\\]{3,}", "(?x) a  # a comment\n",
])
def test_usual_patterns_are_taken(check):
    """Patterns as people write them pass."""
    validate_check(check, "answer: yes, 2024-05-30, Sum: -4", "here")


@pytest.mark.parametrize("pattern, length", [
    ("ab{3}", 4), ("(?:ab{3}){10}", 80), ("((a{1000}){1000}){1000}", 1_002_002_000),
    (r"[^\]a]{3}", 18), (r"\{4}", 4), ("a{0,9}", 1), ("))a{2}", 4),
])
def test_expanded_length(pattern, length):
    """The length of a pattern with its repetitions written out, brackets included."""
    assert expanded_length(pattern) == length


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.text(r"ab()[]{}0123,?*+\^$|.PNux<>=!&:-#'", max_size=14), st.text("ab12 ", max_size=9))
def test_any_pattern_is_taken_or_refused(pattern, text):
    """Whatever stands in `check`, it is taken or refused with a UserError, nothing else; what is
    taken matches the text that it was taken with."""
    if expanded_length(pattern) > LARGEST_PATTERN:
        return
    try:
        validate_check(pattern, text, "here", time_limit=0.2)
    except UserError:
        return
    assert matches_check(pattern, text, text)
