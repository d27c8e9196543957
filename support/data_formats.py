"""Rows read: files, folders and data sets of the Hub, and the shapes that conversations come in.

The shapes of a row (docs/data.md shows each):
- `messages`: a conversation; its last assistant turn is the response, what stands before the prompt
- `prompt` with `chosen` (and `rejected`): strings, or message lists; `completion` means `chosen`
- `chosen` (and `rejected`) as whole conversations, the prompt implied
- `conversations` of `from` and `value`: ShareGPT
- `chosen` (and `rejected`) as text of "Human:" and "Assistant:": HH-RLHF
- `instruction`, `input`, `output`: Alpaca

Beside these a row may have `system`, the text of the system turn, and `check`, see checks.py.
"""
import json
import re
from pathlib import Path

from support.errors import UserError, error_text, printable
from support.settings import located

LARGEST_ROW = 2_000_000         # characters; more takes minutes to tokenize, to keep a few thousand
SUFFIXES = (".jsonl", ".json", ".parquet")
COLUMNS = ("messages", "prompt", "chosen", "rejected", "completion", "conversations", "instruction",
           "input", "output", "history", "system", "check")     # those that split_row looks at
RESPONSES = ("chosen", "messages", "completion", "conversations")       # the first that a row has
ROLES = {"human": "user", "gpt": "assistant"}       # ShareGPT's names; others stay as they are


def read_rows(path: str, revision: str | None = None) -> list[tuple[str, dict | UserError]]:
    """All rows of `path`, each with its place ("file, line 3").

    path: a .jsonl, .json or .parquet file, a folder of such files, or a data set of the Hub ("name"
    or "name:split"; the split is "train" where none is named).
    revision: a branch, tag or commit of a data set of the Hub.

    A row that can't be read is replaced by the UserError that says why. Raises UserError when there
    are no rows.
    """
    source = located(path)
    if source.exists():
        if revision:
            raise UserError(f"--data_revision {revision}: {path} is no data set of the Hub")
        rows = [row for file in data_files(source) for row in read_file(file)]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", path) and not path.endswith(SUFFIXES):
        rows = read_table(path, revision)
    else:
        raise UserError(f"{printable(path)}: no such file or folder; --data takes a .jsonl, .json "
                        "or .parquet file, a folder of them, or a data set of the Hub")
    if not rows:
        raise UserError(f"{printable(path)}: no rows in it")
    return rows


def data_files(source: Path) -> list[Path]:
    """The file itself, or the data files of a folder in the order of their names."""
    if not source.is_dir():
        return [source]
    return sorted(file for file in source.iterdir() if file.suffix in SUFFIXES)


def read_file(file: Path) -> list[tuple[str, dict | UserError]]:
    """The rows of a .parquet table, of a JSON list in a .json file, or of lines of JSON objects."""
    if file.suffix == ".parquet":
        return read_table(file)
    name = printable(str(file))
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{name}: can't be read ({error.strerror})") from None
    if file.suffix == ".json" and content.lstrip().startswith(b"["):
        parsed = parse_json(content, name)
        if isinstance(parsed, UserError):
            raise parsed
        rows = [(f"{name}, row {i}", row) for i, row in enumerate(parsed, 1)]
    else:
        lines = ((f"{name}, line {i}", line) for i, line in enumerate(content.split(b"\n"), 1))
        rows = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    return [(where, check_row(row, where)) for where, row in rows]


def parse_json(text: bytes, where: str):
    """JSON as Python has it, or the UserError that says what is wrong with the text."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 at byte {error.start}; convert it first")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON at character {error.pos} ({error.msg})")
    except (ValueError, RecursionError) as error:       # thousands of digits, brackets in brackets
        return UserError(f"{where}: not a row ({error})")


def check_row(row, where: str) -> dict | UserError:
    """The row itself, or a UserError where it is no object or no conversation can be as large."""
    if isinstance(row, UserError):
        return row
    if not isinstance(row, dict):
        return UserError(f"{where}: expected an object with `messages` or `prompt` and `chosen`, "
                         f"found {type(row).__name__}")
    size = len(repr(row))
    if size > LARGEST_ROW:
        return UserError(f"{where}: {size / 1e6:.1f} million characters in one row, more than a "
                         f"conversation can have ({LARGEST_ROW / 1e6:.0f} million); split it")
    return row


def read_table(source: str | Path, revision: str | None = None) -> list[tuple[str, dict]]:
    """The rows of a .parquet file, or of a data set of the Hub by its name, with `datasets`."""
    shown = printable(str(source))
    try:
        import datasets
    except ImportError:
        what = ("reading .parquet" if isinstance(source, Path)
                else "no such file or folder, and reading it from the Hub")
        raise UserError(f"{shown}: {what} needs the datasets library: "
                        "pip install datasets") from None
    name, _, split = str(source).partition(":")
    try:
        if isinstance(source, Path):
            table = datasets.load_dataset("parquet", data_files=str(source), split="train")
        else:
            table = datasets.load_dataset(name, split=split or "train", revision=revision)
    except Exception as error:          # no such name, no network, gated, damaged: each has its own
        raise UserError(f"{shown}: the datasets library can't read it "
                        f"({printable(error_text(error))}); a split is named as in "
                        "org/name:train_sft, a revision with --data_revision") from None
    known = [column for column in table.column_names if column in COLUMNS]
    if set(known) & {*RESPONSES, "output"}:     # else the message about the first row names all
        table = table.select_columns(known)     # what else there is would fill the memory
    return [(f"{shown}, row {i}", row) for i, row in enumerate(table.to_list(), 1)]


def split_row(row: dict, where: str):
    """A row of any accepted shape -> (prompt, chosen, rejected).

    prompt: a string (raw text), or a list of messages. chosen: the text of the response.
    rejected: a text, or None. Raises UserError that begins with `where` on any other shape.

        {"messages": [user, assistant]}  ->  ([user], "text of the assistant", None)
        {"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}  ->  ([user "a"], "b", None)
        {"instruction": "Add.", "input": "1 2", "output": "3"}
            ->  ([user "Add.\\n\\n1 2"], "3", None)
    """
    row = {name: value for name, value in row.items() if value is not None}     # as tables fill in
    if is_alpaca(row):
        row = alpaca_as_messages(row, where)
    prompt, rejected = row.get("prompt"), as_messages(row.get("rejected"), row)
    chosen = as_messages(next((row[name] for name in RESPONSES if name in row), None), row)
    if isinstance(prompt, str) and isinstance(chosen, list):
        # Data sets of whole conversations often repeat the first question as a string.
        first = chosen[0] if chosen and isinstance(chosen[0], dict) else {"role": "assistant"}
        prompt = [{"role": "user", "content": prompt}] if first.get("role") == "assistant" else []
    if isinstance(chosen, str) and isinstance(prompt, str) and isinstance(rejected, str | None):
        if row.get("system"):
            raise UserError(f"{where}: `system` has no place beside a `prompt` that is raw text; "
                            "write both as messages")
    elif chosen and all(is_messages(turns) for turns in (chosen, prompt or [], rejected or [])):
        prompt, chosen, rejected = split_conversations(
            prompt or [], chosen, rejected, row.get("system"), where)
    else:
        columns = printable(", ".join(map(str, list(row)[:9]))) or "nothing"
        raise UserError(f"{where}: expected `messages`, or `prompt` and `chosen` as two strings or "
                        "two message lists (each message a `role` and a `content`), or `chosen` as "
                        "a whole conversation, or `instruction` and `output`; found "
                        f"{columns}: convert it to one of these, such as "
                        '{"prompt": "...", "chosen": "..."}')
    if not prompt:
        raise UserError(f"{where}: nothing stands before the response, so there is no prompt")
    if not chosen.strip() or (rejected is not None and not rejected.strip()):
        raise UserError(f"{where}: the response is empty")
    return prompt, chosen, rejected


def is_alpaca(row: dict) -> bool:
    return "instruction" in row and ("output" in row or isinstance(row.get("chosen"), str))


def alpaca_as_messages(row: dict, where: str) -> dict:
    """An Alpaca row as `prompt`, `chosen` and `rejected` in messages.

    `history`, if there is one, holds the turns before as pairs of a question and an answer.
    """
    answers = {"chosen": row.get("output", row.get("chosen")), "rejected": row.get("rejected")}
    answers = {name: text for name, text in answers.items() if text is not None}
    texts = [row["instruction"], row.get("input", ""), *answers.values()]
    history = row.get("history", [])
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in history)
    if not pairs or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: expected `instruction`, `input` and `output` as strings, and "
                        "`history` as pairs of strings")
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    asked = [*(text for pair in history for text in pair), question]
    prompt = [{"role": "assistant" if i % 2 else "user", "content": text}
              for i, text in enumerate(asked)]
    found = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {**found, "prompt": prompt, "system": row.get("system")}


def as_messages(value, row: dict):
    """ShareGPT's turns and HH-RLHF's text as messages; anything else as it is."""
    if isinstance(value, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("from"), str) for turn in value):
        return [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
                for turn in value]
    if isinstance(value, str) and "prompt" not in row and value.startswith("\n\nHuman:"):
        texts = re.split(r"\n\n(Human|Assistant): ?", value)[1:]
        return [{"role": "user" if who == "Human" else "assistant", "content": text}
                for who, text in zip(texts[::2], texts[1::2], strict=True)]
    return value


def is_messages(value) -> bool:
    """Is it a list of messages, each with a role and a content that are strings?"""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str) for message in value)


def split_conversations(prompt: list, chosen: list, rejected: list | None, system, where: str
                        ) -> tuple[list, str, str | None]:
    """(messages of the prompt, text of chosen, text of rejected or None) from conversations."""
    before, answer = last_answer(join_turns(prompt, chosen, where), where)
    other = None
    if rejected is not None:
        other_before, other = last_answer(join_turns(prompt, rejected, where), where)
        if other_before != before:
            raise UserError(f"{where}: `chosen` and `rejected` differ before their last assistant "
                            "turn")
    if system:
        if not isinstance(system, str):
            raise UserError(f"{where}: `system` must be a string")
        before = join_turns([{"role": "system", "content": system}], before, where)
    return before, answer, other


def join_turns(prompt: list, turns: list, where: str) -> list:
    """The conversation of `prompt` and the `turns` behind it, which may repeat turns of the prompt.

        [user 1], [assistant 1]  ->  [user 1, assistant 1]
        [user 1], [user 1, assistant 1]  ->  [user 1, assistant 1]

    One system turn stands first. Raises UserError where `prompt` and `turns` have two that differ.
    """
    def key(messages):
        return [(message["role"], message["content"]) for message in messages]

    if not prompt:
        return turns
    systems = [part[0] for part in (prompt, turns) if part and part[0]["role"] == "system"]
    if len(systems) == 2 and key(systems[:1]) != key(systems[1:]):
        raise UserError(f"{where}: two system turns that differ")
    prompt, turns = (part[1:] if part and part[0]["role"] == "system" else part
                     for part in (prompt, turns))
    repeated = next((n for n in range(min(len(prompt), len(turns) - 1), 0, -1)
                     if key(prompt[-n:]) == key(turns[:n])), 0)
    return systems[:1] + prompt + turns[repeated:]


def last_answer(messages: list, where: str) -> tuple[list, str]:
    """(messages before the last assistant turn, its text). Turns after it are left out."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"),
               default=None)
    if last is None:
        raise UserError(f"{where}: no assistant turn; the last one is the response to learn from")
    return messages[:last], messages[last]["content"]
