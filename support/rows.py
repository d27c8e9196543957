"""Data in: read rows, check them, put them through the chat template, tokenize.

A row is one of TRL's formats: `messages`; `prompt` with `chosen` (and `rejected`), as strings or as message lists; or
`chosen` (and `rejected`) as whole conversations with the prompt implied. The last assistant turn is the response,
everything before it the prompt. TRL's `completion` is read as `chosen`. A `check`, if there is one, is a regular expression (see `passes`).
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from support.settings import UserError, located

LARGEST_ROW = 2_000_000         # bytes; tokenizing what is larger takes minutes, to keep a few thousand tokens of it

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VICUNA = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


@dataclass
class Row:
    """One tokenized row. prompt, chosen, rejected: token ids (rejected None where there is none).

    number: its place in the data. check and chosen_text: what `passes` takes (check None where there is none);
    chosen_text is the text of `chosen`, so of a response that was cut, what is left of it.
    """
    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None
    number: int
    check: str | None
    chosen_text: str


def passes(check: str, response: str, chosen: str) -> bool:
    """Is `response` right? It is when the check, a regular expression, finds in it what it finds in the chosen response.

    All matches count, in their order: every step of a worked answer, not the last number alone.

        check "[0-9]+", chosen "2+3=5", response "2 + 3 = 5."  ->  True        response "2+3=6"  ->  False
    """
    return re.findall(check, response) == re.findall(check, chosen)


def read_rows(path: str) -> list[tuple[str, dict | UserError]]:
    """All rows of a .jsonl or .json file, or of the ones in a folder, each with where it stands ("file, line 3").

    In the place of a row that can't be read stands the UserError that says why. Raises UserError when there is nothing.
    """
    source = located(path)
    if not source.exists():
        raise UserError(f"{path}: no such file or folder; --data takes a .jsonl or .json file, or a folder of them")
    files = sorted(f for f in source.iterdir() if f.suffix in (".jsonl", ".json")) if source.is_dir() else [source]
    rows = [row for file in files for row in read_file(file)]
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
        try:
            return [(f"{file}, row {i}", check_row(row, f"{file}, row {i}", 0)) for i, row in enumerate(json.loads(content), 1)]
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not rows ({error})") from None
    rows = []
    for i, line in enumerate(content.split(b"\n"), 1):
        where = f"{file}, line {i}"
        if line.strip():
            try:
                rows.append((where, check_row(json.loads(line.decode("utf-8")), where, len(line))))
            except UnicodeDecodeError as error:
                rows.append((where, UserError(f"{where}: not UTF-8 at byte {error.start} of the line; convert it first")))
            except json.JSONDecodeError as error:
                rows.append((where, UserError(f"{where}: not JSON ({error.msg})")))
            except (ValueError, RecursionError) as error:       # a number of thousands of digits, brackets in brackets
                rows.append((where, UserError(f"{where}: not a row ({error})")))
    return rows


def check_row(row, where: str, size: int) -> dict | UserError:
    if size > LARGEST_ROW:
        return UserError(f"{where}: {size / 1e6:.1f} MB in one row, more than a conversation can have ({LARGEST_ROW / 1e6:.0f} MB); split it")
    if not isinstance(row, dict):
        return UserError(f"{where}: expected an object with `messages` or `prompt` and `chosen`, found {type(row).__name__}")
    return row


def split_row(row: dict, where: str):
    """A row of any accepted shape -> (prompt, chosen, rejected or None): strings, or message lists and response texts.

        {"messages": [user, assistant]}  ->  ([user], "text of the assistant", None)
    """
    def is_messages(value):
        return isinstance(value, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)

    def last_answer(messages):
        """Everything before the last assistant turn, and that turn's text; turns after it are left out."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None:
            raise UserError(f"{where}: no assistant turn; the last one is the response to learn from")
        return messages[:last], messages[last]["content"]

    prompt, rejected = row.get("prompt"), row.get("rejected")
    chosen = row.get("chosen", row.get("messages", row.get("completion")))
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
                        "(each message a `role` and a `content`), or `chosen` as a whole conversation")
    if not result[0]:
        raise UserError(f"{where}: nothing stands before the response, so there is no prompt")
    if not result[1].strip() or rejected is not None and not result[2].strip():
        raise UserError(f"{where}: the response is empty")
    return result


class Tokenize:
    """Rows to token ids: the prompt's ids are a true prefix of the whole, and one end token closes each full response.

    Prompt and response are tokenized apart, as they are when the model answers. A string row is raw text with the EOS
    behind it; messages go through the chat template. Special tokens spelled out in a response are taken as plain text.
    """

    def __init__(self, tokenizer, max_prompt_len: int, max_len: int, use_rejected: bool = True):
        """use_rejected: False leaves the rejected column unread. Raises UserError when there is no end token."""
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        self.tokenizer, self.max_prompt_len, self.max_len = tokenizer, max_prompt_len, max_len
        self.use_rejected, self.prompts_cut = use_rejected, 0
        self.turn_end, self.turn_tail = tokenizer.eos_token_id, ""
        if tokenizer.chat_template:
            self.turn_end, self.turn_tail = self._end_of_turn()

    def _end_of_turn(self) -> tuple[int, str]:
        """The end token the template puts behind an assistant turn (EOS where it puts none), and all it puts there."""
        mark = "qzxqzx"
        text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], False, "the tokenizer")
        if mark not in text:
            raise UserError("the tokenizer's chat template leaves the assistant's text out: there is nothing to train on")
        tail = text[text.rindex(mark) + len(mark):]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in special), self.tokenizer.eos_token_id), tail

    def _render(self, messages, add_generation_prompt, where):
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:              # templates raise whatever their authors chose
            raise UserError(f"{where}: the chat template refuses this conversation: {error}") from None

    def __call__(self, row: dict, where: str, number: int, use_rejected: bool | None = None) -> Row:
        """Tokenize and cut one row, or the error that stands for it. Raises UserError on a row that can't be used."""
        if isinstance(row, UserError):
            raise row
        if not (self.use_rejected if use_rejected is None else use_rejected):
            row = {name: value for name, value in row.items() if name != "rejected"}
        prompt, chosen, rejected = split_row(row, where)
        if not isinstance(prompt, str) and not self.tokenizer.chat_template:
            raise UserError(f"{where}: messages need a chat template and the tokenizer has none; "
                            "pass --chat_template chatml or vicuna")
        try:
            if isinstance(prompt, str):
                ids = self._raw_prompt(prompt)
                answers = [a and [*self._plain(a), self.tokenizer.eos_token_id] for a in (chosen, rejected)]
            else:
                text = self._render(prompt, True, where)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                answers = [a and [*self._answer(prompt, text, a, where), self.turn_end] for a in (chosen, rejected)]
        except TypeError:                       # what tokenizers say to half of a surrogate pair
            raise UserError(f"{where}: holds text that is not valid Unicode") from None
        if not ids:
            raise UserError(f"{where}: the prompt has no tokens")
        ids = self._cut_prompt(ids)
        chosen_ids, rejected_ids = (a and a[:self.max_len - len(ids)] for a in answers)
        return Row(ids, chosen_ids, rejected_ids, number, self._check(row, where),
                   self.tokenizer.decode(chosen_ids, skip_special_tokens=True))

    def _check(self, row, where) -> str | None:
        try:
            re.compile(row.get("check") or "")
        except (re.error, TypeError, OverflowError):
            raise UserError(f"{where}: `check` is not a regular expression") from None
        return row.get("check") or None

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which special tokens, where spelled out, are only text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _raw_prompt(self, text: str) -> list[int]:
        """Ids of a string prompt, with the BOS a tokenizer adds by itself, without the EOS some add."""
        ids, own = self.tokenizer(text)["input_ids"], self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] != own[-1:] else ids

    def _answer(self, prompt, text, answer, where) -> list[int]:
        """Ids of an answer as the template writes it: some trim it, some put an empty thought before it."""
        full = self._render(prompt + [{"role": "assistant", "content": answer}], False, where)
        if not full.startswith(text):
            return self._plain(answer)
        before, said, after = full[len(text):].removesuffix(self.turn_tail).partition(answer.strip())
        if not (before + after).strip():        # nothing but the answer, and spaces it may have merged with
            return self._plain(before + said + after)
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        return [*before, *self._plain(said), *after]

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        """A long prompt loses its start, the part furthest from the answer; a BOS stays."""
        if len(ids) <= self.max_prompt_len:
            return ids
        self.prompts_cut += 1
        bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id and self.max_prompt_len > 1 else []
        return bos + ids[len(ids) - self.max_prompt_len + len(bos):]


def load_data(settings, tokenize: Tokenize, say=print) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows. Without --eval_data every k-th row is held out: 2% of them, at most 200; none with --eval_rows 0.

    Raises UserError on the first row that can't be used; with --skip_bad_rows such rows are left out and counted. say:
    where that, and a warning about prompts that are in both, goes.
    """
    used = selected(settings.rows, settings.data, read_rows(settings.data))
    rows = tokenize_rows(settings.data, used, tokenize, settings.skip_bad_rows, say)
    if settings.eval_data:
        others = list(enumerate(read_rows(settings.eval_data)))
        held = tokenize_rows(settings.eval_data, others, tokenize, settings.skip_bad_rows, say)
    elif settings.eval_rows == 0:
        return rows, []
    else:
        every = held_out_every(len(rows))
        held = rows[every - 1::every]
        rows = [row for i, row in enumerate(rows) if (i + 1) % every]
        others = used
    prompts = {tuple(row.prompt) for row in rows}
    known = sum(tuple(row.prompt) in prompts for row in held)
    if known:
        say(f"warning: {known} of {len(held)} held-out prompts are in the training data too; what is measured on them is memory")
    return rows, [with_rejected(tokenize, row, dict(others)[row.number]) for row in held[:settings.eval_rows]]


def selected(which: str | None, path: str, rows: list) -> list[tuple[int, object]]:
    """The rows that --rows FROM:TO names, numbered as they are in the data."""
    start, _, stop = (which or ":").partition(":")
    used = list(enumerate(rows))[int(start or 0):int(stop) if stop else None]
    if not used:
        raise UserError(f"--rows {which}: {path} has no such rows")
    return used


def held_out_every(rows: int) -> int:
    """Every how manieth row is held out where no --eval_data is given: 2% of them, at most 200."""
    return max(50, -(-rows // 200))


def with_rejected(tokenize: Tokenize, row: Row, source: tuple) -> Row:
    """A held-out row with its rejected response, if it has a usable one: worth measuring on whoever writes those of training."""
    where, raw = source
    try:
        return row if tokenize.use_rejected else tokenize(raw, where, row.number, use_rejected=True)
    except UserError:
        return row


def tokenize_rows(path: str, numbered: list, tokenize: Tokenize, skip_bad_rows: bool, say) -> list[Row]:
    """Rows that can be used, tokenized."""
    rows, bad, tokenize.prompts_cut = [], [], 0
    for number, (where, row) in numbered:
        try:
            found = tokenize(row, where, number)
            if tokenize.use_rejected and found.rejected is None:
                raise UserError(f"{where}: no `rejected` response, which --rejected data needs in every row")
            rows.append(found)
        except UserError as error:
            if not skip_bad_rows:
                raise
            bad.append(error)
    if bad:
        say(f"{path}: {len(bad)} of {len(numbered)} rows left out; the first: {bad[0]}")
    if not rows:
        raise UserError(f"{path}: not one row that can be used")
    if all(len(row.prompt) == tokenize.max_prompt_len for row in rows) and tokenize.prompts_cut >= len(rows):
        raise UserError(f"{path}: every prompt is longer than the {tokenize.max_prompt_len} tokens there are for it and would lose its start; "
                        "raise --max_prompt_len and --max_len")
    return rows
