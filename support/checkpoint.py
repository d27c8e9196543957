"""Models and tokenizers in from a folder or the hub, out to an ordinary Hugging Face folder."""
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.rows import CHATML, VICUNA
from support.settings import Settings, UserError, located


def load_model(settings: Settings, device):
    """The policy and its tokenizer. Weights are fp32 whatever the folder holds: bf16 would round small steps away.

    Raises UserError where there is no model, or one this program can't train.
    """
    name = str(located(settings.model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if settings.random_init:
            torch.manual_seed(settings.seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--model {settings.model}: not a causal language model with its tokenizer ({reason})") from None
    added = set_template(tokenizer, settings.chat_template)
    width = model.get_input_embeddings().num_embeddings
    if added and len(tokenizer) > width:
        model.resize_token_embeddings(len(tokenizer))
    elif len(tokenizer) > width:
        raise UserError(f"--model {settings.model}: the tokenizer has {len(tokenizer)} tokens, the model's embedding only "
                        f"{width}; they do not belong together")
    return model.to(device).eval(), tokenizer       # eval: no dropout, in training either, as in the EMA and reference


def set_template(tokenizer, name: str | None) -> int:
    """Give the tokenizer a chat template by name; returns how many tokens had to be added for it."""
    if name is None:
        return 0
    tokenizer.chat_template = {"chatml": CHATML, "vicuna": VICUNA}[name]
    if name == "vicuna":                            # ends turns with the EOS, so it needs no token of its own
        return 0
    return tokenizer.add_tokens([t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()], special_tokens=True)


def end_token_ids(model, tokenizer, turn_end: int) -> list[int]:
    """Every token that ends a response: the template's own, the tokenizer's EOS, what the model's generation knows."""
    known = model.generation_config.eos_token_id
    return sorted({turn_end, tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None})


def save_model(model, tokenizer, ends: list[int], folder: Path) -> None:
    """Write an ordinary Hugging Face folder: weights, tokenizer, chat template, every end token for generation."""
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_run_folder(out: str | None) -> Path:
    """The output folder, made: --out, or the next free runs/NNNN. Raises UserError where it holds a run already."""
    if out is not None:
        folder = Path(out)
        if (folder / "metrics.jsonl").exists():
            raise UserError(f"--out {out}: holds a run already; name another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
        return folder
    number = 1
    while True:
        folder = Path("runs") / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
