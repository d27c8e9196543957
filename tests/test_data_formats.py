"""Rows read: files, folders and data sets of the Hub, and the shapes that conversations come in."""
import json
import sys
import types

import pytest

from support.data_formats import read_rows, split_row
from support.errors import UserError
from support.settings import parse
from support.tokenize_rows import RowTokenizer, load_data


def turn(role, content):
    return {"role": role, "content": content}


USER, ANSWER, WRONG = (turn("user", "2 + 2?"), turn("assistant", "It is 4."),
                       turn("assistant", "It is 5."))
SYSTEM = turn("system", "Be brief.")
# The columns of data sets as the Hub has them, one row each.
CAPYBARA = {"source": "Airoboros", "conversation": [{"input": "2 + 2?", "output": "It is 4."}],
            "original_response": "It is 4.", "generation_prompt": ["..."],
            "raw_generation_responses": ["..."], "new_generations": ["..."], "prompt": "2 + 2?",
            "chosen": [USER, ANSWER], "rejected": [USER, WRONG], "rating_chosen": 5,
            "rating_rejected": 4, "chosen_model": "a", "rejected_model": "b"}
ULTRAFEEDBACK = {"prompt": "2 + 2?", "prompt_id": "ab12", "chosen": [USER, ANSWER],
                 "rejected": [USER, WRONG], "messages": [USER, ANSWER], "score_chosen": 8.0,
                 "score_rejected": 3.5}
HH_RLHF = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: It is 4.",
           "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: It is 5."}
ULTRACHAT = {"prompt": "2 + 2?", "prompt_id": "ab12", "messages": [USER, ANSWER]}
DEITA = {"conversations": [{"from": "human", "value": "2 + 2?"},
                           {"from": "gpt", "value": "It is 4."}], "source": "evol", "id": "1"}
ALPACA = {"instruction": "2 + 2?", "input": "", "output": "It is 4.", "text": "Below is ..."}
ALPACA_PAIR = {"instruction": "2 + 2?", "input": None, "chosen": "It is 4.",
               "rejected": "It is 5."}
TABLE = {"messages": [USER, ANSWER], "prompt": None, "chosen": None, "rejected": None,
         "system": None, "instruction": None, "check": None}        # tables fill in what is missing


# ---------------------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("row", [CAPYBARA, ULTRAFEEDBACK, HH_RLHF, ULTRACHAT, DEITA, ALPACA,
                                 ALPACA_PAIR, TABLE])
def test_shapes_of_the_hub(row):
    """Rows shaped as Capybara, UltraFeedback-binarized, HH-RLHF, UltraChat, Deita and Alpaca give
    the prompt, chosen and rejected that their message lists would."""
    expected = [USER], "It is 4.", "It is 5." if row.get("rejected") else None
    assert split_row(row, "here") == expected


def test_hh_rlhf_turns():
    """HH-RLHF's texts of several turns: the last answer is the response; an answer may hold blank
    lines."""
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\ne"
    prompt, chosen, rejected = split_row({"chosen": text, "rejected": text + "!"}, "here")
    assert prompt == [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    assert (chosen, rejected) == ("d\n\ne", "d\n\ne!")


def test_alpaca_rows():
    """Alpaca: `input` stands under `instruction`, after a blank line; `history` holds earlier
    turns; `system` comes first. Other types than text are refused."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]],
           "system": "Be brief."}
    expected = [SYSTEM, turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Add.\n\n1 2")]
    assert split_row(row, "here") == (expected, "3", None)
    for wrong in ({"input": 5}, {"history": [["Hi"]]}, {"history": "Hi"}, {"output": ["3"]}):
        with pytest.raises(UserError, match=r"^here: expected `instruction`, `input`"):
            split_row({**row, **wrong}, "here")


@pytest.mark.parametrize("prompt, chosen", [
    ([USER], [ANSWER]), ([USER], [USER, ANSWER]), ([], [USER, ANSWER]), ("2 + 2?", [USER, ANSWER]),
    ("2 + 2?", [ANSWER]), (None, [USER, ANSWER]), ([USER], [USER, ANSWER, turn("user", "thanks")]),
])
def test_turns_of_the_prompt_are_not_doubled(prompt, chosen):
    """`prompt` beside `chosen` as the whole conversation, or as its answer alone, is one and the
    same conversation."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": [*chosen[:-1], WRONG]}
    if chosen[-1]["role"] == "user":
        row["rejected"] = [USER, WRONG]
    assert split_row(row, "here") == ([USER], "It is 4.", "It is 5.")


@pytest.mark.parametrize("prompt, chosen, contents", [
    ([SYSTEM, USER], [USER, ANSWER], ["Be brief.", "2 + 2?"]),
    ([USER], [SYSTEM, USER, ANSWER], ["Be brief.", "2 + 2?"]),
    ([SYSTEM, USER], [SYSTEM, USER, ANSWER], ["Be brief.", "2 + 2?"]),
    ([SYSTEM], [USER, ANSWER], ["Be brief.", "2 + 2?"]),
    ([turn("user", "a"), ANSWER, USER], [USER, ANSWER], ["a", "It is 4.", "2 + 2?"]),
    ([USER, ANSWER, USER], [ANSWER], ["2 + 2?", "It is 4.", "2 + 2?"]),
])
def test_longer_conversations_are_joined(prompt, chosen, contents):
    """System turns and earlier turns stay, once each, whichever column has them."""
    before, answer, _ = split_row({"prompt": prompt, "chosen": chosen}, "here")
    assert [message["content"] for message in before] == contents and answer == "It is 4."


@pytest.mark.parametrize("row", [
    {"messages": [USER, ANSWER]}, {"prompt": [USER], "chosen": [ANSWER]}, HH_RLHF, DEITA, ALPACA,
    {"messages": [SYSTEM, USER, ANSWER]},
])
def test_a_system_column_is_the_system_turn(row):
    """`system` beside any conversation is its system turn; an empty one is none; one that differs
    from the conversation's own, or stands beside raw text, is refused."""
    before, answer, _ = split_row({**row, "system": "Be brief."}, "here")
    assert before == [SYSTEM, USER] and answer == "It is 4."
    assert split_row({**row, "system": ""}, "here") == split_row(row, "here")
    with pytest.raises(UserError, match=r"^here: two system turns that differ"):
        split_row({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."}, "here")
    with pytest.raises(UserError, match=r"^here: `system` has no place beside a `prompt`"):
        split_row({"prompt": "a", "chosen": "b", "system": "Be brief."}, "here")
    with pytest.raises(UserError, match=r"^here: `system` must be a string"):
        split_row({"messages": [USER, ANSWER], "system": 5}, "here")


@pytest.mark.parametrize("row", [{"id": "0", "data": ["a", "b"]}, {"question": "a", "answer": "b"},
                                 {"instruction": "a", "response": "b"}])
def test_unknown_shapes_say_how_to_convert(row):
    """Other shapes are refused with the columns found and the shape to convert to."""
    with pytest.raises(UserError, match="convert it to one of these") as error:
        split_row(row, "here")
    assert all(name in str(error.value) for name in row)


# ------------------------------------------------------------------------------- data of the Hub

class FakeTable:
    """What the datasets library gives, as far as read_table asks."""
    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def select_columns(self, names):
        return FakeTable([{name: row[name] for name in names} for row in self.rows])

    def to_list(self):
        return self.rows


@pytest.fixture
def load_dataset_calls(monkeypatch):
    """Stands for the datasets library; the list of what it was asked for."""
    calls = []

    def load_dataset(name, split, data_files=None, revision=None):
        calls.append((name, split, revision))
        if name == "no/such":
            raise RuntimeError("not\x1b[31m found\nlong story")
        rows = {"org/alpaca": [ALPACA], "org/other": [{"id": 1, "text": "a"}]}
        return FakeTable(rows.get(name, [CAPYBARA, CAPYBARA]))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_of_the_hub(load_dataset_calls, monkeypatch, tmp_path):
    """A name that is no file is a data set of the Hub, "train" unless it names a split; columns of
    no use are not kept, but those of an unknown shape are named."""
    rows = read_rows("argilla/capybara")
    assert [where for where, _ in rows] == ["argilla/capybara, row 1", "argilla/capybara, row 2"]
    assert set(rows[0][1]) == {"prompt", "chosen", "rejected"}
    assert set(read_rows("org/alpaca")[0][1]) == {"instruction", "input", "output"}
    with pytest.raises(UserError, match="found id, text"):
        split_row(read_rows("org/other")[0][1], "here")
    read_rows("org/name:train_sft", revision="v1.0")
    (tmp_path / "a.parquet").write_bytes(b"")
    assert len(read_rows(str(tmp_path))) == 2
    assert load_dataset_calls == [
        ("argilla/capybara", "train", None), ("org/alpaca", "train", None),
        ("org/other", "train", None), ("org/name", "train_sft", "v1.0"), ("parquet", "train", None)]


def test_what_cannot_be_read_of_the_hub(load_dataset_calls, monkeypatch, tmp_path):
    """What the datasets library says becomes one sentence without escape sequences; that the
    library is missing, and that a file has no revision, does too."""
    with pytest.raises(UserError, match=r"can't read it \(not\\x1b\[31m found\)"):
        read_rows("no/such")
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"--data_revision v1: .* is no data set of the Hub"):
        read_rows(str(tmp_path), revision="v1")
    monkeypatch.setitem(sys.modules, "datasets", None)          # as if it were not installed
    for name in ("argilla/capybara", str(tmp_path)):
        with pytest.raises(UserError, match="pip install datasets"):
            read_rows(name)
    with pytest.raises(UserError, match="no such file"):
        read_rows("no/such.jsonl")


def test_the_revision_is_that_of_the_data(load_dataset_calls, tokenizer):
    """--data_revision applies to --data, and to --eval_data where both are of one data set."""
    for held_out, revision in (("org/name:test", "v1"), ("org/else:test", None)):
        settings = parse(["--model", "m", "--data", "org/name", "--eval_data", held_out,
                          "--data_revision", "v1"])
        load_data(settings, RowTokenizer(tokenizer, 100, 200, use_rejected=False), str)
        assert load_dataset_calls[-2:] == [("org/name", "train", "v1"),
                                           (held_out.partition(":")[0], "test", revision)]


# ----------------------------------------------------------------------------------------- files

def test_files_and_folders(tmp_path):
    """.jsonl, .json lists and folders of both are read; rows know where they stand."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n\n{"prompt": "2"}\n')
    (tmp_path / "b.json").write_text('[{"prompt": "3"}]')
    (tmp_path / "c.txt").write_text("no data")
    rows = read_rows(str(tmp_path))
    assert [row["prompt"] for _, row in rows] == ["1", "2", "3"]
    assert [where.split("/")[-1] for where, _ in rows] == [
        "a.jsonl, line 1", "a.jsonl, line 3", "b.json, row 1"]


def test_a_row_too_long_is_named_in_a_list_too(tmp_path):
    """What a .jsonl refuses as too much for one conversation, a JSON list refuses as well."""
    file = tmp_path / "rows.json"
    good = {"prompt": "a", "chosen": "b"}
    file.write_text(json.dumps([good, {**good, "chosen": "b" * 3_000_000}]))
    rows = [row for _, row in read_rows(str(file))]
    assert rows[0] == good and "row 2: 3.0 million" in str(rows[1])


@pytest.mark.parametrize("content, words", [
    ("", "no rows"), ('{"messages": [}', "line 1: not JSON"), ("[1]", "expected an object"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
    ('{"prompt": "a", "chosen": ""}', "empty"),
    ('{"prompt": "a", "chosen": [1]}', "expected `messages`"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "no prompt"),
    ('{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
     '"rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]}',
     "differ before"),
    ("\xff", "UTF-8"), ('{"prompt": "", "chosen": "b"}', "no prompt"),
    ('{"prompt": "a", "chosen": "b", "check": "("}', "not a regular expression"),
    ('{"prompt": "a", "chosen": "b", "check": 5}', "not a regular expression"),
    ('{"prompt": "a", "chosen": "b", "check": "' + "(" * 3000 + ")" * 3000 + '"}', "too deeply"),
    ('{"prompt": "a\\ud83d", "chosen": "b"}', "not valid Unicode"),
    ('{"messages": [{"role": "us\\ud83d", "content": "a"}, '
     '{"role": "assistant", "content": "b"}]}', "not valid Unicode"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
     '"system": "\\ud83d"}', "not valid Unicode"),
    ("[" * 100_000, "not a row"), ('{"a": ' + "9" * 5000 + "}", "not a row"),
])
def test_bad_rows_are_named(content, words, tmp_path, tokenizer):
    """A row that can't be used is refused with its file, its line, what is wrong, and the flag that
    leaves such rows out."""
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content.encode("latin-1"))
    settings = parse(["--model", "m", "--data", str(file), "--eval_rows", "0"])
    with pytest.raises(UserError, match=words) as error:
        load_data(settings, RowTokenizer(tokenizer, 100, 200, use_rejected="rejected" in content))
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)
    assert error.value.status == 2 and ("--skip_bad_rows" in str(error.value)) == (content != "")


def test_messages_are_safe_to_print(tmp_path, tokenizer):
    """Names of files and columns, and what a template says, reach the terminal without escape
    sequences."""
    file = tmp_path / "a\x1b[31m.jsonl"
    file.write_text('{"b\\u001b[2J": 1}')
    settings = parse(["--model", "m", "--data", str(file), "--eval_rows", "0"])
    with pytest.raises(UserError) as error:
        load_data(settings, RowTokenizer(tokenizer, 100, 200, use_rejected=False))
    assert "\x1b" not in str(error.value) and r"b\x1b[2J" in str(error.value)
    with pytest.raises(UserError) as error:
        read_rows("no\x1bsuch")
    assert str(error.value).startswith(r"no\x1bsuch: no such file")


def test_what_a_template_says_is_safe_to_print(tokenizer):
    """The first line of what a chat template raises, without escape sequences."""
    row_tokenizer = RowTokenizer(tokenizer, 100, 200)
    row_tokenizer.template = "{{ raise_exception('no \x1b[31mjudges\nhere') }}"
    with pytest.raises(UserError, match=r"^here: the chat template refuses .*no \\x1b\[31mjudges$"):
        row_tokenizer({"messages": [USER, ANSWER]}, "here", 0)
