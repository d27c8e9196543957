"""Rows to token ids, and which rows are trained on and which held out."""
import copy
import datetime
import json

import made_tokenizers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import support.tokenize_rows
from sapo import Pair
from support.chat_templates import set_template, with_fixed_time
from support.checks import matches_check
from support.errors import RowFailed, UserError
from support.report import pair_statistics
from support.settings import parse
from support.tokenize_rows import MARK, RowTokenizer, load_data

USER = {"role": "user", "content": "2 + 2?"}
ANSWER, WRONG = ({"role": "assistant", "content": f"It is {n}."} for n in (4, 5))
MADE = list(made_tokenizers.MADE)
# Endings, spaces, other scripts, and special tokens spelled out.
ANSWERS = ["Hello", " 4", "x):", "\nnew", "  two  spaces", "def f(x):\n    return x", "é ü", "</s>",
           "a</s>b<s>c", "a <unk>", "<|end|> b<|end|>", "<|assistant|>\nx", "a</s> <s>b "]


@pytest.fixture(scope="module", params=MADE)
def made(request):
    """Each kind of tokenizer, with the Vicuna template."""
    tokenizer = made_tokenizers.MADE[request.param]()
    set_template(tokenizer, "vicuna")
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def rows_file(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def numbered_rows(folder, count):
    return rows_file(folder, [{"prompt": f"q {i}", "chosen": "a"} for i in range(count)])


def data_settings(file, *flags):
    return parse(["--model", "m", "--data", str(file), *flags])


# ------------------------------------------------------------------------ every kind of tokenizer

@pytest.mark.parametrize("kind", ["string", "messages"])
def test_prompt_and_response_decode_to_the_text(made, kind):
    """With every kind of tokenizer the response's ids continue the prompt: together they decode to
    the text, with no space between them that the row does not have. Exactly one end token closes
    the response, and nothing that it spells out becomes a special token."""
    tokenize = RowTokenizer(made, 200, 400)
    for answer in ANSWERS:
        row = {"prompt": "def f(", "chosen": answer} if kind == "string" else chat("Hi", answer)
        example = tokenize(row, "here", 0)
        *response, end = example.chosen
        expected = text_of(made, example.prompt) + answer
        assert text_of(made, example.prompt + response) == expected
        assert end == made.eos_token_id
        assert not set(response) & set(made.all_special_ids), answer


def test_a_response_is_what_the_whole_text_holds(made):
    """Where no token spans the place between prompt and response, the response's ids are the ones
    that tokenizing both as one text gives."""
    prompt, tokenize = "return (", RowTokenizer(made, 200, 400)
    for answer in ("Hello", " 4", "x):", "\nnew", "  two  spaces"):
        example = tokenize({"prompt": prompt, "chosen": answer}, "here", 0)
        whole = made(prompt + answer)["input_ids"]
        if whole[:len(example.prompt)] == example.prompt:
            assert whole == example.prompt + example.chosen[:-1]
        assert made(prompt)["input_ids"] == example.prompt


def test_a_prompt_is_what_the_model_reads_when_it_answers(made):
    """The prompt's ids are those of apply_chat_template with the generation prompt."""
    turns = [USER, ANSWER, {"role": "user", "content": "Sure, many words?"}]
    example = RowTokenizer(made, 200, 400)({"prompt": turns, "chosen": [ANSWER]}, "here", 0)
    assert example.prompt == made.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False)


def test_special_tokens_in_a_prompt_are_text(made):
    """Only the template's own special tokens are live in a prompt, unless
    --special_tokens_in_prompts: then the ids are those of apply_chat_template. A response's are
    never live."""
    tokenize = RowTokenizer(made, 200, 400)
    tokenize_live = RowTokenizer(made, 200, 400, special_tokens_in_prompts=True)
    special, harmless = set(made.all_special_ids), tokenize(chat("abc", "abc"), "here", 0)
    for said in ("a</s>b", "<|end|>", "</s>\n<|assistant|>\nb", "<s><s>", "<unk>"):
        row, turns = chat(said, said), chat(said, said)["messages"][:1]
        plain, live = tokenize(row, "here", 0), tokenize_live(row, "here", 0)
        assert ([i for i in plain.prompt if i in special]
                == [i for i in harmless.prompt if i in special])
        text, other = (text_of(made, example.prompt) for example in (plain, harmless))
        assert text == other.replace("abc", said)
        assert live.prompt == made.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False)
        assert live.chosen == plain.chosen
        assert not special & set(live.chosen[:-1]), said


def test_special_tokens_in_a_string_prompt_are_text(made):
    """The same for raw text, where a BOS that is spelled out and live is not doubled."""
    tokenize = RowTokenizer(made, 200, 400)
    tokenize_live = RowTokenizer(made, 200, 400, special_tokens_in_prompts=True)
    for said in ("a</s>b", "<|end|>", "<s>x"):
        row = {"prompt": said, "chosen": "b"}
        own = tokenize(row, "here", 0).prompt[len(tokenize.raw_prefix):]
        assert not set(own) & set(made.all_special_ids) and text_of(made, own).endswith(said)
        live = tokenize_live(row, "here", 0).prompt
        own = made(said, add_special_tokens=False)["input_ids"]
        assert live in (own, made(said)["input_ids"])
        assert live.count(made.bos_token_id or -1) <= 1, said


@hypothesis_settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(MADE), prompt=st.text("ab <|s/>end\n(2", min_size=1, max_size=12),
       answer=st.text("ab <|s/>end\n(2", min_size=1, max_size=12))
def test_any_text_decodes_to_itself(kind, prompt, answer):
    """Whatever prompt and response are made of, brackets of special tokens included."""
    if not prompt.strip() or not answer.strip():
        return
    tokenizer = made_once(kind)
    example = RowTokenizer(tokenizer, 200, 400)({"prompt": prompt, "chosen": answer}, "here", 0)
    together = text_of(tokenizer, example.prompt + example.chosen[:-1])
    assert together == text_of(tokenizer, example.prompt) + answer
    assert not set(example.chosen[:-1]) & set(tokenizer.all_special_ids)


def made_once(kind, kept={}):       # noqa: B006, hypothesis allows no fixture of function scope
    if kind not in kept:
        kept[kind] = made_tokenizers.MADE[kind]()
    return kept[kind]


def test_words_with_a_prefix_each_keep_it():
    """Where a tokenizer gives every word its own prefix, the words of a response keep theirs."""
    tokenizer = made_tokenizers.word_prefixes()
    row = {"prompt": "How are", "chosen": " you and words"}
    example = RowTokenizer(tokenizer, 200, 400)(row, "here", 0)
    assert example.prompt + example.chosen[:-1] == tokenizer("How are you and words")["input_ids"]


def test_a_token_that_cannot_be_text_is_refused():
    """An end token that is an ordinary character can't stand in a response: one sentence."""
    tokenizer = made_tokenizers.byte_level()
    tokenizer.eos_token = "!"
    with pytest.raises(UserError, match="here: spells out '!', which the tokenizer can't write"):
        RowTokenizer(tokenizer, 200, 400)({"prompt": "a", "chosen": "Hello!"}, "here", 0)
    tokenizer = made_tokenizers.byte_level()
    tokenizer.pad_token = "!"                   # of a pad token nothing depends
    example = RowTokenizer(tokenizer, 200, 400)({"prompt": "a", "chosen": "Hello!"}, "here", 0)
    assert text_of(tokenizer, example.chosen) == "Hello!<|end|>"


# ------------------------------------------------------------------------------------- templates

@pytest.mark.parametrize("row", [
    {"messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER, {"role": "user", "content": "thanks"}]},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
    {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
    {"prompt": [], "chosen": [USER, ANSWER]}, {"prompt": "2 + 2?", "chosen": [USER, ANSWER]},
    {"prompt": "2 + 2?", "chosen": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER]},
])
def test_message_rows(row, tokenizer):
    """Every shape of message row gives the same prompt ids and response ids; one end token closes
    the response."""
    example = RowTokenizer(tokenizer, 100, 200)(row, "here", 3)
    text = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.prompt) == text
    assert tokenizer.decode(example.chosen) == "It is 4.<|im_end|>"
    assert example.chosen.count(tokenizer.eos_token_id) == 1 and example.example_id == 3
    assert example.prompt == tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False)
    if "rejected" in row:
        assert tokenizer.decode(example.rejected) == "It is 5.<|im_end|>"


def test_string_rows(tokenizer):
    """Strings are raw text, then EOS: no template."""
    row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    example = RowTokenizer(tokenizer, 100, 200)(row, "here", 0)
    assert tokenizer.decode(example.prompt) == "2 + 2 ="
    assert tokenizer.decode(example.chosen) == " 4<|im_end|>"
    assert example.rejected[-1] == tokenizer.eos_token_id


GENERATION_PROMPT = "{% if add_generation_prompt %}assistant:{% endif %}"
TURN = "{% for m in messages %}{{ m.role }}:"
THOUGHT = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
# As Qwen 3: a thought in the answer is taken out and written anew, with line breaks.
REWRITTEN = ("{% if m.role == 'assistant' and '</t>' in m.content %}<t>\n"
             "{{ m.content.split('</t>')[0] }}\n</t>{{ m.content.split('</t>')[1] }}"
             "{% else %}{{ m.content }}{% endif %}")


@pytest.mark.parametrize("template, ending", [
    ("{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}<|im_end|>\n{% endfor %}"
     "{% if add_generation_prompt %}<assistant> {% endif %}", "x"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% endif %}", "x"),
    (TURN + THOUGHT + "{{ m.content }}<|im_end|>{% endfor %}" + GENERATION_PROMPT,
     "<think></think>x"),
    # What stands behind the end token depends on the answer, so it can't be known beforehand.
    (TURN + "{{ m.content }}<|im_end|>{% if 'y' in m.content %}\n\n{% endif %}{% endfor %}"
     + GENERATION_PROMPT, "x"),
])
def test_one_end_token_whatever_the_template(template, ending, tokenizer):
    """A template that trims, one that ends turns with no token at all, one that adds a thought, one
    with a tail that varies: one end token each, and an end token spelled out in the text is not
    one. An answer that stands in the thought too is told from the thought."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    changed.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for said in ("x", "x<|im_end|>y", "think"):
        example = RowTokenizer(changed, 100, 200)(chat("2 + 2?", said), "here", 0)
        assert example.chosen.count(changed.eos_token_id) == 1
        assert changed.decode(example.chosen) == ending[:-1] + said + "<|im_end|>"
        think = changed.convert_tokens_to_ids("<think>")
        assert example.chosen.count(think) == ending.count("<think>")


def test_an_answer_that_the_template_takes_apart(tokenizer):
    """A template that takes an answer apart and writes it anew, as Qwen 3's does with a thought,
    leaves special tokens that the answer spells out what they are: text."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TURN + REWRITTEN + "<|im_end|>{% endfor %}" + GENERATION_PROMPT
    said = "<think<|im_end|></t>y<|im_end|>z"
    example = RowTokenizer(changed, 100, 200)(chat("2 + 2?", said), "here", 0)
    assert changed.decode(example.chosen) == "<t>\n<think<|im_end|>\n</t>y<|im_end|>z<|im_end|>"
    assert example.chosen.count(changed.eos_token_id) == 1


def test_a_template_that_ends_a_turn_before_the_answer(tokenizer):
    """An end token that the template writes before the answer would end the response there, so the
    response is the answer alone."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (TURN + "{% if m.role == 'assistant' %}thought<|im_end|>{% endif %}"
                             "{{ m.content }}<|im_end|>{% endfor %}" + GENERATION_PROMPT)
    example = RowTokenizer(changed, 100, 200)(chat("2 + 2?", "four"), "here", 0)
    assert changed.decode(example.chosen) == "four<|im_end|>"


def test_a_template_that_looks_for_a_special_token(tokenizer):
    """Where the template's text depends on a special token in the row, keeping the token plain
    would change the template's text: one sentence, and the flag that takes the token as live."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (TURN + "{{ m.content.split('<|im_start|>')[-1] }}<|im_end|>"
                             "{% endfor %}" + GENERATION_PROMPT)
    row = chat("a<|im_start|>b", "c")
    with pytest.raises(UserError, match=r"here: spells out .* --special_tokens_in_prompts"):
        RowTokenizer(changed, 100, 200).check(row, "here")
    example = RowTokenizer(changed, 100, 200, special_tokens_in_prompts=True)(row, "here", 0)
    assert changed.decode(example.prompt) == "user:b<|im_end|>assistant:"


def test_role_tokens_that_are_not_marked_as_special(tokenizer):
    """Some tokenizers do not mark the tokens around a turn as special. A row that spells one out
    begins no turn with it; other added tokens, such as a thought's, stay live."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<@user@>", "<@assistant@>", "<thought>"])
    changed.chat_template = ("{% for m in messages %}<@{{ m.role }}@>{{ m.content }}<|im_end|>"
                             "{% endfor %}{% if add_generation_prompt %}<@assistant@>{% endif %}")
    said = "a<|im_end|><@user@>b<thought>"
    example = RowTokenizer(changed, 100, 200)(chat(said, said), "here", 0)
    user, thought = changed.convert_tokens_to_ids(["<@user@>", "<thought>"])
    assert (example.prompt.count(user), example.chosen.count(user)) == (1, 0)
    assert (example.prompt.count(thought), example.chosen.count(thought)) == (1, 1)
    assert changed.decode(example.chosen) == said + "<|im_end|>"


def test_the_mark_is_no_text_of_a_row(tokenizer):
    """The characters that mark special tokens are refused in a row, so none is lost from it."""
    with pytest.raises(UserError, match="here: holds the private characters"):
        RowTokenizer(tokenizer, 100, 200).check(chat(f"a{MARK}b", "c"), "here")


def test_named_templates_match_the_paper(tokenizer):
    """--chat_template chatml and vicuna write what Appendix B shows; no token is added where the
    tokenizer has it."""
    bare = copy.deepcopy(tokenizer)
    assert set_template(bare, "vicuna") == 0
    assert bare.apply_chat_template([USER, ANSWER], tokenize=False) == (
        "<|user|>\n2 + 2?<|im_end|>\n<|assistant|>\nIt is 4.<|im_end|>\n")
    assert set_template(bare, "chatml") == 0
    assert bare.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert set_template(made_tokenizers.byte_level(), "chatml") == 2


@pytest.mark.parametrize("bos, template, text", [
    ("<s>", "chatml", "<s><|im_start|>user\na<|im_end|>\n"),
    ("<s>", "vicuna", "<s><|user|>\na</s>\n"),
    ("<|im_start|>", "chatml", "<|im_start|>user\na<|im_end|>\n"),
])
def test_one_bos_however_the_template_begins(bos, template, text):
    """A tokenizer's BOS stands before the conversation once, also where the template begins with
    that token by itself."""
    tokenizer = made_tokenizers.sentencepiece_bpe("first", bos)
    set_template(tokenizer, template)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == text
    example = RowTokenizer(tokenizer, 100, 200)(chat("a", "b"), "here", 0)
    assert example.prompt[0] == tokenizer.bos_token_id != example.prompt[1]


def test_templates_are_told_when_the_run_started(tokenizer):
    """A template that asks for the date is told the run's start, so a resumed run renders the same
    text another day."""
    changed = copy.deepcopy(tokenizer)
    # As Llama 3.1's: asks whether the function is there, and an apostrophe stands before the call.
    changed.chat_template = (
        "\n{%- if strftime_now is defined %}"
        "{%- set today = strftime_now(\"%d %b %Y\") %}{%- endif %}"
        "It's {{ today }}, {{ strftime_now('%H:%M') }} o'clock.\n" + tokenizer.chat_template)
    start = datetime.datetime(2024, 5, 30, 12, 7)
    example = RowTokenizer(changed, 100, 200, start_time=start)(chat("a", "b"), "here", 0)
    expected = "It's 30 May 2024, 12:07 o'clock.\n<|im_start|>user\na<|im_end|>\n"
    assert changed.decode(example.prompt).startswith(expected)
    assert changed.decode(example.chosen) == "b<|im_end|>"


def test_a_fixed_time_changes_nothing_else(tokenizer):
    """A template that begins with line breaks or asks for no time renders as it does by itself."""
    for template in ("\n\n  {% if true %}a{% endif %}", " b", "\n{{- messages[0].content }}"):
        asking = template + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
        text, variables = with_fixed_time(asking, datetime.datetime(2024, 5, 30))
        rendered = [tokenizer.apply_chat_template([USER], chat_template=one, tokenize=False, **more)
                    for one, more in ((asking, {}), (text, variables))]
        assert rendered[0] == rendered[1]
    assert with_fixed_time("b", datetime.datetime(2024, 5, 30)) == ("b", {})


# ------------------------------------------------------------------------------------------ cuts

def test_cuts(tokenizer):
    """A long prompt loses its start, a long response its end and with it the end token; nothing
    else is cut."""
    row = {"prompt": " a b c d e f", "chosen": " g h i j"}
    whole = RowTokenizer(tokenizer, 100, 200)(row, "here", 0)
    length = len(whole.prompt)
    cut = RowTokenizer(tokenizer, length - 2, length + 1)(row, "here", 0)
    assert cut.prompt == whole.prompt[2:] and cut.chosen == whole.chosen[:3] and cut.prompt_cut
    assert tokenizer.eos_token_id not in cut.chosen
    fits = RowTokenizer(tokenizer, length, length + len(whole.chosen))(row, "here", 0)
    assert (fits.prompt, fits.chosen) == (whole.prompt, whole.chosen) and not fits.prompt_cut


def test_a_bos_stays_where_a_prompt_is_cut():
    """Of a prompt that is cut the BOS stays."""
    tokenizer = made_tokenizers.sentencepiece_bpe("first")
    row = {"prompt": "many words " * 9, "chosen": "a"}
    cut = RowTokenizer(tokenizer, 5, 20)(row, "here", 0).prompt
    assert cut == [tokenizer.bos_token_id, *tokenizer(row["prompt"])["input_ids"][-4:]]


def test_chosen_text_is_what_is_trained_on(tokenizer):
    """Rejected answers are compared with y+ as it is: cut where it was cut, with what the template
    adds, so y+ itself always passes."""
    row = {"prompt": "a b", "chosen": "first 2 + 3 = 5", "check": "[0-9]+"}
    for room in (200, 6):
        example = RowTokenizer(tokenizer, 100, room)(row, "here", 0)
        decoded = tokenizer.decode(example.chosen, skip_special_tokens=True)
        assert matches_check(row["check"], decoded, example.chosen_text)
    assert "5" not in example.chosen_text


# -------------------------------------------------------------------------- rows used, held out

def test_held_out_rows(tmp_path, tokenizer):
    """Without --eval_data a fixed 2%, at most 200 rows, is held out, never trained on, the same
    every time."""
    file = numbered_rows(tmp_path, 400)
    row_tokenizer = RowTokenizer(tokenizer, 100, 200, use_rejected=False)
    first, second = ([[example.example_id for example in part]
                      for part in load_data(data_settings(file), row_tokenizer)] for _ in range(2))
    assert first == second
    trained, held_out = first
    assert (len(trained), len(held_out)) == (392, 8) and not set(trained) & set(held_out)


def test_rows_of_a_file(tmp_path, tokenizer):
    """--rows takes a part of the file, numbered as in the whole; a part that is empty or misspelled
    is refused."""
    file = numbered_rows(tmp_path, 40)

    def numbers(part):
        row_tokenizer = RowTokenizer(tokenizer, 100, 200, use_rejected=False)
        examples, _ = load_data(data_settings(file, "--rows", part), row_tokenizer)
        return [example.example_id for example in examples]

    assert numbers("30:") == list(range(30, 40))
    assert numbers(":3") == [0, 1, 2] and numbers("5:7") == [5, 6]
    for part in ("50:", "1-3"):
        with pytest.raises(UserError, match="--rows"):
            numbers(part)


def test_statistics_look_at_the_pairs_own_rows(tokenizer, embedded_data):
    """A pair is checked against the row it was made of, whatever rows --rows and the held-out split
    leave out."""
    settings = data_settings(embedded_data / "train.jsonl", "--rows", "100:400")
    examples, held_out = load_data(settings, RowTokenizer(tokenizer, 200, 256, use_rejected=False))
    assert len(examples) == 294 and len(held_out) == 6
    places = (0, 60, 293)
    wrong = [Pair(examples[i].prompt, examples[i].chosen, examples[i].chosen[3:], 0,
                  example_id=examples[i].example_id) for i in places]
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    spaced = [pair._replace(rejected=[*space, *pair.chosen]) for pair in wrong]
    assert [examples[i] for i in places] == [examples.by_id(pair.example_id) for pair in wrong]
    for pairs, worse in ((wrong, 3), (spaced, 0)):
        statistics = pair_statistics(pairs, examples, tokenizer, [tokenizer.eos_token_id])
        assert statistics["worse"] == (worse, 3)


def test_a_row_that_fails_late(tokenizer, tmp_path, monkeypatch):
    """What only tokenizing tells of a row: of few rows it is found before training, and
    --skip_bad_rows leaves the row out; of more it ends the run when the row's turn comes, with a
    sentence of its own and status 4."""
    file = numbered_rows(tmp_path, 1200)
    row_tokenizer = RowTokenizer(tokenizer, 100, 200, use_rejected=False)
    prompt_ids = row_tokenizer._prompt_ids
    monkeypatch.setattr(row_tokenizer, "_prompt_ids", lambda prompt, where: (
        ([], "") if prompt == "q 701" else prompt_ids(prompt, where)))
    settings = data_settings(file, "--eval_rows", "0")
    with pytest.raises(UserError, match="line 702: the prompt has no tokens; --skip_bad_rows"):
        load_data(settings, row_tokenizer)
    skipping = data_settings(file, "--eval_rows", "0", "--skip_bad_rows")
    assert len(load_data(skipping, row_tokenizer)[0]) == 1199
    monkeypatch.setattr(support.tokenize_rows, "KEPT", 1000)
    examples, _ = load_data(settings, row_tokenizer)
    with pytest.raises(RowFailed, match="line 702: the prompt has no tokens") as error:
        examples[701]
    assert error.value.status == 4 and len(examples[700].prompt) > 0


class CountingTokenizer(RowTokenizer):
    """Counts the prompts that it tokenizes."""
    count = 0

    def _prompt_ids(self, prompt, where):
        self.count += 1
        return super()._prompt_ids(prompt, where)


def test_rows_are_tokenized_when_asked_for(tokenizer, tmp_path):
    """Of 30,000 rows at most 500 are tokenized before training, and each is checked: a bad one at
    the end is refused, and so is a tokenizer with ids that the model lacks."""
    file = numbered_rows(tmp_path, 30_000)
    row_tokenizer = CountingTokenizer(tokenizer, 100, 200, use_rejected=False)
    examples, held_out = load_data(data_settings(file, "--eval_rows", "20"), row_tokenizer)
    assert len(examples) == 30_000 - 200 and len(held_out) == 20 and row_tokenizer.count <= 520
    assert examples.by_id(29_998).prompt == tokenizer("q 29998")["input_ids"]
    row_tokenizer = RowTokenizer(tokenizer, 100, 200, use_rejected=False, known_ids=5)
    with pytest.raises(UserError, match=r"has 5 entries; they do not belong together$"):
        load_data(data_settings(file, "--eval_rows", "0"), row_tokenizer)
    with file.open("a") as rows:
        rows.write("[1]\n")
    with pytest.raises(UserError, match="line 30001"):
        load_data(data_settings(file), RowTokenizer(tokenizer, 100, 200, use_rejected=False))


@pytest.mark.parametrize("kept", [1000, 10])
def test_long_prompts_are_dropped(kept, tokenizer, tmp_path, monkeypatch):
    """--drop_long_prompts leaves out and counts every row whose prompt has max_prompt_len tokens or
    more, also of rows that are tokenized only when their turn comes."""
    monkeypatch.setattr(support.tokenize_rows, "KEPT", kept)
    lengths = np.random.default_rng(0).integers(1, 40, 60).tolist()
    file = rows_file(tmp_path, [{"prompt": " a" * n, "chosen": "b"} for n in lengths])
    row_tokenizer = CountingTokenizer(tokenizer, 20, 200, use_rejected=False)
    per_token = len(tokenizer(" a" * 10)["input_ids"]) // 10
    short = [i for i, n in enumerate(lengths) if n * per_token < 20]
    said = []
    settings = data_settings(file, "--eval_rows", "0", "--drop_long_prompts")
    examples, _ = load_data(settings, row_tokenizer, said.append)
    assert [example.example_id for example in examples] == short and 0 < len(short) < 60
    assert not any(example.prompt_cut for example in examples)
    assert f"{60 - len(short)} of 60 rows left out by --drop_long_prompts" in said[0]
    everything, _ = load_data(data_settings(file, "--eval_rows", "0"), row_tokenizer, said.append)
    assert len(everything) == 60 and any(example.prompt_cut for example in everything)


def test_spelled_out_special_tokens_are_counted(tokenizer, tmp_path):
    """How many rows spell out special tokens is said once, with the flag that makes them live."""
    rows = [chat("a", "b"), chat("a<|im_end|>", "b"), {"prompt": "a", "chosen": "b<|im_end|>"}]
    said, file = [], rows_file(tmp_path, rows)
    settings = data_settings(file, "--eval_rows", "0")
    load_data(settings, RowTokenizer(tokenizer, 100, 200, use_rejected=False), said.append)
    assert len(said) == 1 and "2 of 3 rows spell out special tokens" in said[0]
    assert "line 2" in said[0] and "--special_tokens_in_prompts" in said[0]


def test_a_fingerprint_changes_with_any_row(tokenizer, tmp_path):
    """Examples.fingerprint() is the same for the same rows and another when one changes."""
    row_tokenizer, found = RowTokenizer(tokenizer, 100, 200, use_rejected=False), []
    for answer in ("b", "b", "c"):
        file = rows_file(tmp_path, [chat("a", "b"), chat("a", answer)])
        settings = data_settings(file, "--eval_rows", "0")
        found.append(load_data(settings, row_tokenizer)[0].fingerprint())
    assert found[0] == found[1] != found[2]
