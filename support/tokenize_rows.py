"""Rows to token ids: chat template, end tokens, cuts; and which rows are held out."""
import datetime
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from support.chat_templates import with_fixed_time
from support.checks import validate_check
from support.continuations import Continuations
from support.data_formats import read_rows, split_row
from support.errors import RowFailed, UserError, error_text, printable

KEPT = 20_000           # examples kept; of more rows, each is tokenized anew when its turn comes
LENGTH_SAMPLE = 500     # examples that are enough to say how long the examples are

# Stands inside the control tokens that a row spells out, while the template is rendered.
MARK = "\ue0f3\ue0f4"


class WrongTokenizer(UserError):
    """The tokenizer gives ids that the model has no embedding for."""


@dataclass
class TokenizedExample:
    """One tokenized row. prompt, chosen, rejected: token ids (rejected None where there is none).

    example_id: the row's number in the data. check, chosen_text: what `matches_check` takes (check
    None where there is none); chosen_text is the text of `chosen`, so of a response that was cut,
    what is left of it. prompt_cut: the prompt lost its start.
    """
    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None
    example_id: int
    check: str | None
    chosen_text: str
    prompt_cut: bool = False


class RowTokenizer:
    """Rows to token ids.

    The prompt's ids are those that the model reads before it answers. The response's ids are those
    of text that continues the prompt, followed by exactly one end token; so prompt and response
    together decode to the text. A string row is raw text with the EOS behind it; messages go
    through the chat template. Special tokens that a row spells out are plain text: in a response
    always, in a prompt unless special_tokens_in_prompts. The template's own are live.
    """

    def __init__(self, tokenizer, max_prompt_len: int, max_len: int, use_rejected: bool = True,
                 known_ids: int | None = None, special_tokens_in_prompts: bool = False,
                 start_time: datetime.datetime | None = None):
        """max_prompt_len, max_len: tokens of the prompt, and of prompt and response together.
        use_rejected: False leaves the rejected column unread. known_ids: entries of the model's
        embedding; a tokenizer may have more, which go unused (None: not looked at). start_time:
        the time that templates are told which ask for it (None: now).

        Raises UserError when there is no end token.
        """
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token: set eos_token in its "
                            "tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_prompt_len, self.max_len, self.use_rejected = max_prompt_len, max_len, use_rejected
        self.known_ids, self.special_tokens_in_prompts = known_ids, special_tokens_in_prompts
        self.start_time = start_time or datetime.datetime.now()
        self.turn_end, self.turn_tail = tokenizer.eos_token_id, ""
        role_tokens, self.has_template = set(), bool(tokenizer.chat_template)
        if self.has_template:
            self.template, self.template_variables = self._fixed_template()
            self.turn_end, self.turn_tail = self._end_of_turn()
            role_tokens = self._role_tokens()
        self.end_ids = {tokenizer.eos_token_id, self.turn_end}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        ends = tokenizer.convert_ids_to_tokens(list(self.end_ids))
        control_tokens = {*tokenizer.all_special_tokens, *special, *role_tokens, *ends}
        self.continuations = Continuations(tokenizer, control_tokens, self.end_ids)
        self.raw_prefix = self._raw_prefix()
        self.roles_tried = set()

    @classmethod
    def from_settings(cls, s, tokenizer, model) -> "RowTokenizer":
        """The row tokenizer of a run."""
        return cls(tokenizer, s.max_prompt_len, s.max_len,
                   use_rejected=s.rejected == "data" and s.loss != "sft",
                   known_ids=model.get_input_embeddings().num_embeddings,
                   special_tokens_in_prompts=s.special_tokens_in_prompts,
                   start_time=datetime.datetime.fromisoformat(s.template_date))

    def _fixed_template(self) -> tuple[str, dict]:
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError as error:     # several templates, none of them the default
            raise UserError(f"the tokenizer: {printable(error_text(error))}") from None
        return with_fixed_time(template, self.start_time)

    def _end_of_turn(self) -> tuple[int, str]:
        """The end token the template puts behind an assistant turn (EOS where it puts none), and
        all the text it puts there."""
        answer = "qzxqzx"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        text = self._render(turns, False, "the tokenizer")
        if answer not in text:
            raise UserError("the tokenizer's chat template leaves the assistant's text out: there "
                            "is nothing to train on")
        tail = text[text.rindex(answer) + len(answer):]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in special), self.tokenizer.eos_token_id), tail

    def _role_tokens(self) -> set[str]:
        """Added tokens that the template writes around turns. Some tokenizers do not mark theirs as
        special ("<|user|>"); a row that spells one out must not begin a turn with it."""
        turns = [{"role": role, "content": "qzxqzx"} for role in ("user", "assistant", "user")]
        try:
            text = self._render(turns, False, "the tokenizer")
        except UserError:
            return set()
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return {token for token in added if token in text and not token.strip().isalnum()}

    def _raw_prefix(self) -> list[int]:
        """The ids that the tokenizer by itself puts before plain text: often a BOS."""
        own = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(ids)) if ids[i:i + len(own)] == own), 0)
        return ids[:at]

    def _render(self, messages, add_generation_prompt, where) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False,
                add_generation_prompt=add_generation_prompt, **self.template_variables)
        except Exception as error:              # templates raise whatever their authors chose
            raise UserError(f"{where}: the chat template refuses this conversation: "
                            f"{printable(error_text(error))}") from None

    def check(self, row: dict, where: str, use_rejected: bool | None = None):
        """Everything that makes a row unusable, short of tokenizing it.

        where: the row's place, as in "file, line 3". use_rejected: read the rejected column if
        there is one (None: as the constructor was told). Returns (prompt, chosen, rejected) as
        split_row does. Raises UserError, which may also stand in the row's place.
        """
        if isinstance(row, UserError):
            raise row
        if not (self.use_rejected if use_rejected is None else use_rejected):
            row = {name: value for name, value in row.items() if name != "rejected"}
        prompt, chosen, rejected = split_row(row, where)
        try:
            text = json.dumps([prompt, chosen, rejected], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds text that is not valid Unicode") from None
        if MARK.encode() in text:
            raise UserError(f"{where}: holds the private characters U+E0F3 U+E0F4, which mark "
                            "special tokens here; leave them out")
        if row.get("check"):
            validate_check(row["check"], chosen, where)
        if not isinstance(prompt, str):
            if not self.has_template:
                raise UserError(f"{where}: messages need a chat template and the tokenizer has "
                                "none; pass --chat_template chatml or vicuna")
            roles = tuple(message["role"] for message in prompt)
            if self.spells_control_token(prompt, chosen, rejected):
                for answer in filter(None, (chosen, rejected)):
                    self._response_text(prompt, self._prompt_text(prompt, where), answer, where)
            elif roles not in self.roles_tried:         # what templates refuse is an order of roles
                self._render(prompt, True, where)
                self.roles_tried.add(roles)
        return prompt, chosen, rejected

    def spells_control_token(self, prompt, *responses: str | None) -> bool:
        """Does the row spell out a special token, or one that the template writes around turns?"""
        texts = [prompt] if isinstance(prompt, str) else strings_in(prompt)
        texts += [response for response in responses if response]
        return self.continuations.spells_control_token("\n".join(texts))

    def __call__(self, row: dict, where: str, example_id: int,
                 use_rejected: bool | None = None) -> TokenizedExample:
        """Tokenize and cut one row. where, use_rejected: as in `check`. Raises UserError on a row
        that can't be used."""
        prompt, chosen, rejected = self.check(row, where, use_rejected)
        ids, text = self._prompt_ids(prompt, where)
        if not ids:
            raise UserError(f"{where}: the prompt has no tokens")
        cut = self._cut_prompt(ids)
        chosen_ids, rejected_ids = (
            answer and self._response_ids(prompt, text, answer, where)[:self.max_len - len(cut)]
            for answer in (chosen, rejected))
        largest = max(*cut, *chosen_ids, *(rejected_ids or []))
        if self.known_ids and largest >= self.known_ids:
            raise WrongTokenizer(f"{where}: the tokenizer gives id {largest}, the model's "
                                 f"embedding has {self.known_ids} entries; they do not belong "
                                 "together")
        chosen_text = self.tokenizer.decode(chosen_ids, skip_special_tokens=True)
        return TokenizedExample(cut, chosen_ids, rejected_ids, example_id, row.get("check") or None,
                                chosen_text, len(ids) > len(cut))

    def fills_prompt(self, prompt, where: str, example: TokenizedExample | None) -> bool:
        """Does a prompt (as `check` returns it) have max_prompt_len tokens or more before the cut?

        example: what its row was tokenized to, if it was, so that the prompt need not be.
        """
        ids = example.prompt if example else self._prompt_ids(prompt, where)[0]
        return len(ids) >= self.max_prompt_len

    def _prompt_ids(self, prompt, where: str) -> tuple[list[int], str]:
        """Ids of a prompt before it is cut, and its text, in which MARK stands inside control
        tokens that are not live."""
        if isinstance(prompt, str):
            ids = (self.continuations.whole_ids(prompt, live=True) if self.special_tokens_in_prompts
                   else self.continuations.plain_ids(prompt, where, before=None))
            bos_twice = ids[:1] == self.raw_prefix == [self.tokenizer.bos_token_id]
            return (ids if bos_twice or not ids else self.raw_prefix + ids), prompt
        text = self._prompt_text(prompt, where)
        first, *others = text.split(MARK)
        ids, before = self.continuations.whole_ids(first, live=True), first
        for part in others:
            # Behind a stand-in rather than with `ids`: what the tokenizer itself would write here.
            found = self.continuations.ids_behind(part, before, live=True)
            ids += self.continuations.ids(part, before, live=True) if found is None else found
            before += part
        return ids, text

    def _prompt_text(self, prompt: list, where: str) -> str:
        """The prompt as the template writes it, MARK inside control tokens that are not live."""
        text = self._render(prompt, True, where)
        if self.special_tokens_in_prompts or not self.spells_control_token(prompt):
            return text
        marked = self._render(self._marked(prompt), True, where)
        return self._same_but_marked(marked, text, where)

    def _response_text(self, prompt: list, prompt_text: str, answer: str, where: str) -> str:
        """All that the template writes behind the prompt, up to the end of the turn, MARK inside
        control tokens of the answer: some templates trim it, some put an empty thought before it.

        Where the template writes the prompt otherwise when there is an answer, the answer alone.
        """
        turns = [*prompt, {"role": "assistant", "content": answer}]
        text = self._render(turns, False, where)
        if self.spells_control_token([] if self.special_tokens_in_prompts else prompt, answer):
            marked = prompt if self.special_tokens_in_prompts else self._marked(prompt)
            turns = [*marked, *self._marked(turns[-1:])]
            text = self._same_but_marked(self._render(turns, False, where), text, where)
        if not text.startswith(prompt_text):
            return self._marked(answer)
        return text[len(prompt_text):].removesuffix(self.turn_tail)

    def _same_but_marked(self, marked: str, text: str, where: str) -> str:
        if marked.replace(MARK, "") != text:
            raise UserError(f"{where}: spells out a special token that the chat template looks "
                            "for; leave it out, or, in a prompt, pass --special_tokens_in_prompts")
        return marked

    def _marked(self, value):
        """`value` with MARK inside every control token in its strings."""
        if isinstance(value, str):
            return MARK.join(self.continuations.split_spelled(value))
        if isinstance(value, list):
            return [self._marked(inner) for inner in value]
        if isinstance(value, dict):
            return {name: self._marked(inner) for name, inner in value.items()}
        return value

    def _response_ids(self, prompt, prompt_text: str, answer: str, where: str) -> list[int]:
        """Ids of a response and its one end token."""
        plain_ids = self.continuations.plain_ids
        if isinstance(prompt, str):
            return [*plain_ids(answer, where, prompt), self.tokenizer.eos_token_id]
        text = self._response_text(prompt, prompt_text, answer, where)
        if not self.continuations.spells_control_token(text):       # nothing of the template's own
            return [*plain_ids(text.replace(MARK, ""), where, prompt_text), self.turn_end]
        ids, before = [], prompt_text
        for part in text.split(MARK):
            ids += self.continuations.ids(part, before, live=True)
            before += part
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        behind = self.tokenizer.decode(ids[end:], skip_special_tokens=True)
        if not end or behind.strip():       # the template ends a turn before the answer
            return [*plain_ids(answer, where, prompt_text), self.turn_end]
        return [*ids[:end], self.turn_end]

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        """A long prompt loses its start, the part furthest from the answer; a BOS stays."""
        if len(ids) <= self.max_prompt_len:
            return ids
        keeps_bos = ids[0] == self.tokenizer.bos_token_id and self.max_prompt_len > 1
        bos = ids[:1] if keeps_bos else []
        return bos + ids[len(ids) - self.max_prompt_len + len(bos):]


def strings_in(value) -> list[str]:
    """All strings in nested lists and dictionaries, keys left out."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in strings_in(item)]


class Source(NamedTuple):
    """A row as it was read.

    row_number: its number in the data. where: its place, as in "file, line 3". content: its
    columns. prompt_hash: a checksum of its prompt. example: what it was tokenized to, None where
    there are more than KEPT rows.
    """
    row_number: int
    where: str
    content: dict
    prompt_hash: int
    example: TokenizedExample | None


class Examples(Sequence):
    """Tokenized rows. Where there are more than KEPT, a row is tokenized when it is asked for: all
    of 200,000 would take many minutes. A row that fails then raises RowFailed."""

    def __init__(self, sources: list[Source], row_tokenizer: RowTokenizer):
        self.sources, self.row_tokenizer = sources, row_tokenizer
        self.places = {source.row_number: place for place, source in enumerate(sources)}
        self._kept = functools.lru_cache(KEPT)(self._tokenize_in_training)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: int) -> TokenizedExample:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._kept(place)

    def by_id(self, example_id: int) -> TokenizedExample:
        """The example of the row with this number in the data."""
        return self[self.places[example_id]]

    @functools.cached_property
    def length_sample(self) -> list[TokenizedExample]:
        """All examples, or at most LENGTH_SAMPLE of them, spread over the data.

        Raises UserError, not RowFailed: it is asked for before training, by all processes.
        """
        every = -(-len(self) // LENGTH_SAMPLE)
        return [self._tokenize(place) for place in range(0, len(self), every)]

    def fingerprint(self) -> int:
        """A number that changes when any row does."""
        total = 0
        for source in self.sources:
            total = zlib.crc32(repr(source.content).encode(), total)
        return total

    def _tokenize(self, place: int) -> TokenizedExample:
        source = self.sources[place]
        return source.example or self.row_tokenizer(
            source.content, source.where, source.row_number)

    def _tokenize_in_training(self, place: int) -> TokenizedExample:
        try:
            return self._tokenize(place)
        except UserError as error:
            raise RowFailed(f"{error}; leave this row out of the data, or go on from the last "
                            "checkpoint with it put right") from None


def load_data(settings, row_tokenizer: RowTokenizer, say: Callable[[str], None] = print
              ) -> tuple[Examples, list[TokenizedExample]]:
    """Training and held-out examples. Without --eval_data every k-th row is held out: 2% of them,
    at most 200; none with --eval_rows 0.

    Every row is checked. Raises UserError on the first that can't be used; with --skip_bad_rows
    such rows are left out and counted. say: what prints that count and the warnings.
    """
    rows = read_rows(settings.data, settings.data_revision)
    selected = select_rows(settings.rows, settings.data, rows)
    sources = usable_sources(settings, settings.data, selected, row_tokenizer, say)
    held_out = []
    if settings.eval_data:
        same = settings.eval_data.partition(":")[0] == settings.data.partition(":")[0]
        rows = read_rows(settings.eval_data, settings.data_revision if same else None)
        held_out = usable_sources(
            settings, settings.eval_data, list(enumerate(rows)), row_tokenizer, say)
    elif settings.eval_rows:
        interval = holdout_interval(len(sources))
        held_out = sources[interval - 1::interval]
        sources = [source for i, source in enumerate(sources, 1) if i % interval]
    prompts = {source.prompt_hash for source in sources}
    known = sum(source.prompt_hash in prompts for source in held_out)
    if known:
        say(f"warning: {known} of {len(held_out)} held-out prompts are in the training data too; "
            "what is measured on them is memory")
    examples = Examples(sources, row_tokenizer)
    if all(example.prompt_cut for example in examples.length_sample):
        raise UserError(f"{printable(settings.data)}: every prompt is longer than the "
                        f"{row_tokenizer.max_prompt_len} tokens there are for it and would lose "
                        "its start; raise --max_prompt_len and --max_len")
    return examples, [with_rejected(row_tokenizer, source)
                      for source in held_out[:settings.eval_rows]]


def select_rows(which: str | None, path: str, rows: Sequence) -> list[tuple[int, tuple]]:
    """The rows that --rows FROM:TO names, each with its number in the data.

    Raises UserError where there are none.
    """
    start, _, stop = (which or ":").partition(":")
    selected = list(enumerate(rows))[int(start or 0):int(stop) if stop else None]
    if not selected:
        raise UserError(f"--rows {which}: {printable(path)} has no such rows")
    return selected


def holdout_interval(rows: int) -> int:
    """Hold out every k-th row where no --eval_data is given: k."""
    return max(50, -(-rows // 200))


def with_rejected(row_tokenizer: RowTokenizer, source: Source) -> TokenizedExample:
    """A held-out example with its rejected response, if it has a usable one. Held-out rejected
    responses are measured on, whatever the rejected responses of training are."""
    try:
        return row_tokenizer(source.content, source.where, source.row_number, use_rejected=True)
    except UserError:
        return source.example or row_tokenizer(source.content, source.where, source.row_number)


def usable_sources(settings, path: str, rows: list[tuple[int, tuple]], row_tokenizer: RowTokenizer,
                   say: Callable[[str], None]) -> list[Source]:
    """The rows that can be used. Up to KEPT rows are tokenized here. Of more rows only the prompts
    are, and only to count their tokens for --drop_long_prompts."""
    sources, bad, too_long, spelled, keep = [], [], [], [], len(rows) <= KEPT
    for row_number, (where, row) in rows:
        try:
            prompt, chosen, rejected = row_tokenizer.check(row, where)
            if row_tokenizer.use_rejected and rejected is None:
                raise UserError(f"{where}: no `rejected` response, which --rejected data needs in "
                                "every row")
            example = row_tokenizer(row, where, row_number) if keep else None
            if settings.drop_long_prompts and row_tokenizer.fills_prompt(prompt, where, example):
                too_long.append(where)
                continue
        except WrongTokenizer:          # no fault of the row
            raise
        except UserError as error:
            if not settings.skip_bad_rows:
                raise UserError(f"{error}; --skip_bad_rows leaves such rows out") from None
            bad.append(error)
            continue
        if row_tokenizer.spells_control_token(prompt, chosen, rejected):
            spelled.append(where)
        sources.append(Source(row_number, where, row, zlib.crc32(str(prompt).encode()), example))
    path = printable(path)
    if bad:
        say(f"{path}: {len(bad)} of {len(rows)} rows left out; the first: {bad[0]}")
    if too_long:
        say(f"{path}: {len(too_long)} of {len(rows)} rows left out by --drop_long_prompts, their "
            f"prompts have {row_tokenizer.max_prompt_len} tokens or more; the first: {too_long[0]}")
    if spelled:
        taken = ("live in prompts and plain text in responses" if settings.special_tokens_in_prompts
                 else "plain text; --special_tokens_in_prompts makes those in prompts live")
        say(f"{path}: {len(spelled)} of {len(rows)} rows spell out special tokens, which are "
            f"{taken}; the first: {spelled[0]}")
    if not sources:
        raise UserError(f"{path}: not one row that can be used")
    return sources
