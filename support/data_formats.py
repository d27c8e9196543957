"""Rows read: files, folders and data sets of the Hub, and the shapes that conversations come in.

A row is one of TRL's formats: `messages`; `prompt` with `chosen` (and `rejected`), as strings or as message lists; or
`chosen` (and `rejected`) as whole conversations with the prompt implied; TRL's `completion` is read as `chosen`. Besides
these, ShareGPT's `conversations` (from, value), and HH-RLHF's texts of "Human:" and "Assistant:". The last assistant turn
is the response, everything before it the prompt. A `check`, if there is one, is a regular expression (see checks.matches_check).
"""
import json
import re
from pathlib import Path

from support.errors import UserError, error_text
from support.settings import located

LARGEST_ROW = 2_000_000         # characters; tokenizing what is larger takes minutes, to keep a few thousand tokens of it
COLUMNS = ("messages", "prompt", "chosen", "rejected", "completion", "conversations", "check")      # those that are looked at
ROLES = {"human": "user", "gpt": "assistant"}       # ShareGPT's names; others are taken as they are


def read_rows(path: str) -> list[tuple[str, dict | UserError]]:
    """All rows of a .jsonl, .json or .parquet file, of the ones in a folder, or of a data set of the Hub ("name" or
    "name:split"; the split is "train" where none is named), each with where it stands ("file, line 3").

    In the place of a row that can't be read stands the UserError that says why. Raises UserError when there is nothing.
    """
    source = located(path)
    if source.exists():
        files = sorted(f for f in source.iterdir() if f.suffix in (".jsonl", ".json", ".parquet")) if source.is_dir() else [source]
        rows = [row for file in files for row in (read_table if file.suffix == ".parquet" else read_file)(file)]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", path) and not path.endswith((".jsonl", ".json", ".parquet")):
        rows = read_table(path)
    else:
        raise UserError(f"{path}: no such file or folder; --data takes a .jsonl, .json or .parquet file, a folder of them, or a data set of the Hub")
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def read_file(file: Path) -> list[tuple[str, dict | UserError]]:
    """The rows of one file: a JSON list in a .json file, otherwise one JSON object a line."""
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    if file.suffix == ".json" and content.lstrip().startswith(b"["):
        found = parsed(content, str(file))
        if isinstance(found, UserError):
            raise found
        rows = [(f"{file}, row {i}", row) for i, row in enumerate(found, 1)]
    else:
        lines = ((f"{file}, line {i}", line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip())
        rows = [(where, parsed(line, where)) for where, line in lines]
    return [(where, check_row(row, where)) for where, row in rows]


def parsed(text: bytes, where: str):
    """JSON as Python has it, or the UserError that says what is wrong with it."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 at byte {error.start}; convert it first")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON at character {error.pos} ({error.msg})")
    except (ValueError, RecursionError) as error:       # a number of thousands of digits, brackets in brackets
        return UserError(f"{where}: not rows ({error})")


def check_row(row, where: str) -> dict | UserError:
    if isinstance(row, UserError):
        return row
    if not isinstance(row, dict):
        return UserError(f"{where}: expected an object with `messages` or `prompt` and `chosen`, found {type(row).__name__}")
    size = len(repr(row))
    if size > LARGEST_ROW:
        return UserError(f"{where}: {size / 1e6:.1f} million characters in one row, more than a conversation can have ({LARGEST_ROW / 1e6:.0f} million); split it")
    return row


def read_table(source: str | Path) -> list[tuple[str, dict]]:
    """The rows of a .parquet file, or of a data set of the Hub by its name, through the datasets library."""
    try:
        import datasets
    except ImportError:
        what = "reading .parquet" if isinstance(source, Path) else "no such file or folder, and reading it from the Hub"
        raise UserError(f"{source}: {what} needs the datasets library: pip install datasets") from None
    name, _, split = str(source).partition(":")
    try:
        if isinstance(source, Path):
            table = datasets.load_dataset("parquet", data_files=str(source), split="train")
        else:
            table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:          # no such data set or split, no network, gated, damaged: each has its own
        raise UserError(f"{source}: the datasets library can't read it ({error_text(error)}); "
                        "a split is named as in org/name:train_sft") from None
    known = [column for column in table.column_names if column in COLUMNS]
    table = table.select_columns(known) if set(known) - {"prompt", "check"} else table      # what else there is would fill the memory
    return [(f"{source}, row {i}", row) for i, row in enumerate(table.to_list(), 1)]


def split_row(row: dict, where: str):
    """A row of any accepted shape -> (prompt, chosen, rejected or None): strings, or message lists and response texts.

        {"messages": [user, assistant]}  ->  ([user], "text of the assistant", None)
        {"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}  ->  ([user "a"], "b", None)
    """
    def as_messages(value):
        """ShareGPT's turns and HH-RLHF's text as messages; anything else as it is."""
        if isinstance(value, list) and all(isinstance(turn, dict) and isinstance(turn.get("from"), str) for turn in value):
            return [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in value]
        if isinstance(value, str) and "prompt" not in row and value.startswith("\n\nHuman:"):
            texts = re.split(r"\n\n(Human|Assistant): ?", value)[1:]
            return [{"role": "user" if who == "Human" else "assistant", "content": text} for who, text in zip(texts[::2], texts[1::2])]
        return value

    def is_messages(value):
        return isinstance(value, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)

    def last_answer(messages):
        """Everything before the last assistant turn, and that turn's text; turns after it are left out."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None:
            raise UserError(f"{where}: no assistant turn; the last one is the response to learn from")
        return messages[:last], messages[last]["content"]

    row = {name: value for name, value in row.items() if value is not None}        # tables fill in what a row lacks
    prompt, rejected = row.get("prompt"), as_messages(row.get("rejected"))
    chosen = as_messages(next((row[name] for name in ("chosen", "messages", "completion", "conversations") if name in row), None))
    if isinstance(prompt, str) and isinstance(chosen, list):        # the first question again, beside the conversation
        asked = bool(chosen) and isinstance(chosen[0], dict) and chosen[0].get("role") != "assistant"
        prompt = [] if asked else [{"role": "user", "content": prompt}]
    if isinstance(chosen, str) and isinstance(prompt, str) and isinstance(rejected, str | None):
        result = prompt, chosen, rejected
    elif chosen and is_messages(chosen) and (prompt is None or is_messages(prompt)) and (rejected is None or is_messages(rejected)):
        before, answer = last_answer((prompt or []) + chosen)
        other = None if rejected is None else last_answer((prompt or []) + rejected)
        if other and other[0] != before:
            raise UserError(f"{where}: `chosen` and `rejected` differ before their last assistant turn")
        result = before, answer, other and other[1]
    else:
        raise UserError(f"{where}: expected `messages`, or `prompt` and `chosen` as two strings or two message lists "
                        "(each message a `role` and a `content`), or `chosen` as a whole conversation; found "
                        f"{', '.join(map(str, list(row)[:9])) or 'nothing'}: convert it to one of these, such as "
                        '{"prompt": "...", "chosen": "..."}')
    if not result[0]:
        raise UserError(f"{where}: nothing stands before the response, so there is no prompt")
    if not result[1].strip() or rejected is not None and not result[2].strip():
        raise UserError(f"{where}: the response is empty")
    return result
