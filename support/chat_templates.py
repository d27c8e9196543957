"""Chat templates: the two of the paper's Appendix B by name; templates that ask for the date."""
import datetime
import re

CHATML = ("{% for message in messages %}"
          "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VICUNA = ("{% for message in messages %}"
          "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA}

# Replaces the function of the same name that transformers gives to templates. What a template is
# given must be plain data (newer versions of transformers see to that), so a dictionary answers.
STRFTIME_NOW = ("{% macro strftime_now(format) %}{{ run_start[format] if format in run_start else "
                "raise_exception('strftime_now with a format that the template does not spell "
                "out') }}{% endmacro %}\n")


def set_template(tokenizer, name: str | None) -> int:
    """Give the tokenizer a chat template by name (None leaves it as it is).

    A tokenizer that puts a BOS before plain text gets one before the conversation too, unless the
    template begins with that token by itself. Returns how many tokens were added for the template.
    """
    if name is None:
        return 0
    tokenizer.chat_template = TEMPLATES[name]
    if adds_bos(tokenizer):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        if not text.startswith(tokenizer.bos_token):
            tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES[name]
    if name == "vicuna":            # ends turns with the EOS, so it needs no token of its own
        return 0
    missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
    return tokenizer.add_tokens(missing, special_tokens=True)


def with_fixed_time(template: str, time: datetime.datetime) -> tuple[str, dict]:
    """(template, variables for it) with which `strftime_now` in the template gives `time`."""
    if "strftime_now" not in template:
        return template, {}
    # Whatever stands between two quotes may be a format: each quote up to the next of its kind.
    texts = {text for _, text in re.findall(r"""(?=(['"])(.*?)\1)""", template) if "%" in text}
    answers = {text: time.strftime(text) for text in texts if "{%" not in text}
    return STRFTIME_NOW + template, {"run_start": answers}


def adds_bos(tokenizer) -> bool:
    """Does the tokenizer put a BOS before plain text?"""
    return (tokenizer.bos_token_id is not None
            and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
