"""Rows to token ids: chat template, end tokens, cuts; and which rows are trained on and which held out."""
import functools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from support.data_formats import read_rows, split_row
from support.errors import RowFailed, UserError

KEPT = 20_000           # tokenized rows kept; others are tokenized anew when their turn comes again

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VICUNA = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


class WrongTokenizer(UserError):
    """The tokenizer gives ids that the model has no embedding for."""


@dataclass
class Row:
    """One tokenized row. prompt, chosen, rejected: token ids (rejected None where there is none).

    number: its place in the data. check and chosen_text: what `matches_check` takes (check None where there is none);
    chosen_text is the text of `chosen`, so of a response that was cut, what is left of it.
    """
    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None
    number: int
    check: str | None
    chosen_text: str
    prompt_cut: bool = False


class Tokenize:
    """Rows to token ids: the prompt's ids are a true prefix of the whole, and one end token closes each full response.

    Prompt and response are tokenized apart, as they are when the model answers. A string row is raw text with the EOS
    behind it; messages go through the chat template. Special tokens spelled out in a response are taken as plain text.
    """

    def __init__(self, tokenizer, max_prompt_len: int, max_len: int, use_rejected: bool = True, known_ids: int | None = None):
        """use_rejected: False leaves the rejected column unread. known_ids: how many the model's embedding has; a tokenizer
        may have more, which go unused (none: not looked at). Raises UserError when there is no end token."""
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        self.tokenizer, self.max_prompt_len, self.max_len, self.use_rejected = tokenizer, max_prompt_len, max_len, use_rejected
        self.known_ids, self.roles_tried = known_ids, set()
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

    def check(self, row: dict, where: str, use_rejected: bool | None = None):
        """What makes a row unusable, short of tokenizing it. Returns (prompt, chosen, rejected) as split_row does.

        use_rejected: read the rejected column if there is one (none: as the constructor was told).
        Raises UserError, which may also stand in the row's place.
        """
        if isinstance(row, UserError):
            raise row
        needed = self.use_rejected if use_rejected is None else use_rejected
        prompt, chosen, rejected = split_row(row if needed else {name: row[name] for name in row if name != "rejected"}, where)
        try:
            texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
            "".join([*texts, chosen, rejected or ""]).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds text that is not valid Unicode") from None
        try:
            re.compile(row.get("check") or "")
        except (re.error, TypeError, OverflowError):
            raise UserError(f"{where}: `check` is not a regular expression") from None
        if not isinstance(prompt, str):
            if not self.tokenizer.chat_template:
                raise UserError(f"{where}: messages need a chat template and the tokenizer has none; "
                                "pass --chat_template chatml or vicuna")
            roles = tuple(message["role"] for message in prompt)
            if roles not in self.roles_tried:           # what templates refuse is an order of roles
                self._render(prompt, True, where)
                self.roles_tried.add(roles)
        return prompt, chosen, rejected

    def __call__(self, row: dict, where: str, number: int, use_rejected: bool | None = None) -> Row:
        """Tokenize and cut one row. Raises UserError on one that can't be used. use_rejected: as in check."""
        prompt, chosen, rejected = self.check(row, where, use_rejected)
        if isinstance(prompt, str):
            ids = self._raw_prompt(prompt)
            answers = [a and [*self._plain(a), self.tokenizer.eos_token_id] for a in (chosen, rejected)]
        else:
            text = self._render(prompt, True, where)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            answers = [a and [*self._answer(prompt, text, a, where), self.turn_end] for a in (chosen, rejected)]
        if not ids:
            raise UserError(f"{where}: the prompt has no tokens")
        cut = self._cut_prompt(ids)
        chosen_ids, rejected_ids = (a and a[:self.max_len - len(cut)] for a in answers)
        largest = max(*cut, *chosen_ids, *(rejected_ids or []))
        if self.known_ids and largest >= self.known_ids:
            raise WrongTokenizer(f"{where}: the tokenizer gives id {largest}, the model's embedding has {self.known_ids} entries; they do not belong together")
        return Row(cut, chosen_ids, rejected_ids, number, row.get("check") or None,
                   self.tokenizer.decode(chosen_ids, skip_special_tokens=True), len(ids) > len(cut))

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
        before, said, after = full[len(text):].removesuffix(self.turn_tail).rpartition(answer.strip())
        if not (before + after).strip():        # nothing but the answer, and spaces it may have merged with
            return self._plain(before + said + after)
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        return [*before, *self._plain(said), *after]

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        """A long prompt loses its start, the part furthest from the answer; a BOS stays."""
        if len(ids) <= self.max_prompt_len:
            return ids
        bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id and self.max_prompt_len > 1 else []
        return bos + ids[len(ids) - self.max_prompt_len + len(bos):]


class Source(NamedTuple):
    """A row as it was read: its number in the data, where it stands, its content, a checksum of its prompt; and, of few
    rows, what it was tokenized to."""
    number: int
    where: str
    content: dict
    prompt: int
    row: Row | None


class Rows(Sequence):
    """Rows that are tokenized when they are asked for, where they are many: all of 200,000 would take many minutes."""

    def __init__(self, sources: list[Source], tokenize: Tokenize):
        self.sources, self.tokenize = sources, tokenize
        self.places = {source.number: place for place, source in enumerate(sources)}
        self._row = functools.lru_cache(KEPT)(self._due)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: int) -> Row:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._row(place)

    def _due(self, place: int) -> Row:
        try:
            return self._read(place)
        except UserError as error:
            raise RowFailed(f"{error}; leave this row out of the data, or go on from the last checkpoint with it put right") from None

    def _read(self, place: int) -> Row:
        source = self.sources[place]
        return source.row or self.tokenize(source.content, source.where, source.number)

    def numbered(self, number: int) -> Row:
        """The row with this number in the data."""
        return self[self.places[number]]

    @functools.cached_property
    def some(self) -> list[Row]:
        """All rows, or 500 of them spread over the data where there are more: enough to say how long they are.

        Raises UserError, as it is for a time at which all processes are told of it.
        """
        return [self._read(place) for place in range(0, len(self), -(-len(self) // 500))]

    def fingerprint(self) -> int:
        """A number that changes when any row does."""
        return functools.reduce(lambda found, source: zlib.crc32(repr(source.content).encode(), found), self.sources, 0)


def load_data(settings, tokenize: Tokenize, say=print) -> tuple[Rows, list[Row]]:
    """Training and held-out rows. Without --eval_data every k-th row is held out: 2% of them, at most 200; none with --eval_rows 0.

    Every row is checked. Raises UserError on the first that can't be used; with --skip_bad_rows such rows are left out and
    counted. say: where that, and a warning about prompts that are in both, goes.
    """
    sources = usable(settings.data, selected(settings.rows, settings.data, read_rows(settings.data)), tokenize, settings.skip_bad_rows, say)
    held = []
    if settings.eval_data:
        held = usable(settings.eval_data, list(enumerate(read_rows(settings.eval_data))), tokenize, settings.skip_bad_rows, say)
    elif settings.eval_rows:
        every = held_out_every(len(sources))
        held = sources[every - 1::every]
        sources = [source for i, source in enumerate(sources) if (i + 1) % every]
    prompts = {source.prompt for source in sources}
    known = sum(source.prompt in prompts for source in held)
    if known:
        say(f"warning: {known} of {len(held)} held-out prompts are in the training data too; what is measured on them is memory")
    rows = Rows(sources, tokenize)
    if all(row.prompt_cut for row in rows.some):
        raise UserError(f"{settings.data}: every prompt is longer than the {tokenize.max_prompt_len} tokens there are for it and would lose its start; "
                        "raise --max_prompt_len and --max_len")
    return rows, [with_rejected(tokenize, source) for source in held[:settings.eval_rows]]


def selected(which: str | None, path: str, rows: list) -> list[tuple[int, tuple]]:
    """The rows that --rows FROM:TO names, numbered as they are in the data."""
    start, _, stop = (which or ":").partition(":")
    used = list(enumerate(rows))[int(start or 0):int(stop) if stop else None]
    if not used:
        raise UserError(f"--rows {which}: {path} has no such rows")
    return used


def held_out_every(rows: int) -> int:
    """Every how manieth row is held out where no --eval_data is given."""
    return max(50, -(-rows // 200))


def with_rejected(tokenize: Tokenize, source: Source) -> Row:
    """A held-out row with its rejected response, if it has a usable one: worth measuring on whoever writes those of training."""
    try:
        return tokenize(source.content, source.where, source.number, use_rejected=True)
    except UserError:
        return source.row or tokenize(source.content, source.where, source.number)


def usable(path: str, numbered: list, tokenize: Tokenize, skip_bad_rows: bool, say) -> list[Source]:
    """The rows that can be used. Up to KEPT of them are tokenized here; of more, what tokenizing alone would tell comes late."""
    sources, bad, few = [], [], len(numbered) <= KEPT
    for number, (where, row) in numbered:
        try:
            prompt, _, rejected = tokenize.check(row, where)
            if tokenize.use_rejected and rejected is None:
                raise UserError(f"{where}: no `rejected` response, which --rejected data needs in every row")
            sources.append(Source(number, where, row, zlib.crc32(str(prompt).encode()), tokenize(row, where, number) if few else None))
        except UserError as error:
            if not skip_bad_rows or isinstance(error, WrongTokenizer):      # that is no row's fault
                raise
            bad.append(error)
    if bad:
        say(f"{path}: {len(bad)} of {len(numbered)} rows left out; the first: {bad[0]}")
    if not sources:
        raise UserError(f"{path}: not one row that can be used")
    return sources
