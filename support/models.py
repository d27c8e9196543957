"""Models and tokenizers in from a folder or the hub, out to an ordinary Hugging Face folder."""
import contextlib
import dataclasses
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from support.parallel import out_of_memory
from support.tokenize_rows import CHATML, VICUNA
from support.errors import RunFailed, UserError, error_text
from support.settings import Settings, located, method


def load_model(settings: Settings, world):
    """The policy and its tokenizer. Weights are fp32 whatever the folder holds: bf16 would round small steps away.

    With --shard the whole of it lies on rank 0's CPU and nothing but shapes on the others. Lowers the settings' max_len to
    the positions the model has. Raises UserError where there is no model, or one this program can't train.
    """
    name = str(located(settings.model))
    torch.manual_seed(settings.seed)        # of fresh weights: --random_init, and the rows of tokens that are added
    try:
        trust = {"trust_remote_code": settings.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
        if settings.random_init or world.sharded and not world.is_main:
            with torch.device("meta") if world.sharded and not world.is_main else contextlib.nullcontext():
                model = fresh_model(AutoConfig.from_pretrained(name, **trust), torch.float32, settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **trust)
    except Exception as error:          # each way in which a folder can be damaged or incomplete has its own
        if out_of_memory(error):
            raise
        raise UserError(f"--model {settings.model}: not a causal language model with its tokenizer ({error_text(error)})") from None
    added = set_template(tokenizer, settings.chat_template)
    if added and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not model.get_input_embeddings().weight.is_meta)
    try:                                            # saving refuses what loading let pass: find out now
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True    # sampling values beside do_sample=False are the usual reason
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or settings.max_len
    settings.max_len = min(settings.max_len, positions)
    settings.max_prompt_len = min(settings.max_prompt_len, settings.max_len - 1)
    # eval: no dropout, in training either, as in the EMA model and the reference
    return (model if world.sharded else model.to(world.device)).eval(), tokenizer


def fresh_model(config, dtype, settings: Settings):
    """A model of that shape with random weights; on the meta device with none."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    model.tie_weights()         # transformers 5.0 leaves that out on the meta device
    return model


def checkpoint_layers(model) -> None:
    """Gradient checkpointing: each decoder layer keeps its input only. The model stays in eval mode, without dropout."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable     # the older name
    enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True           # transformers checkpoints in training mode only; the layer's parts stay as they are
            for name, value in vars(layer).items():
                if name.endswith("dropout") and isinstance(value, float):       # some layers (OPT's) apply their own
                    setattr(layer, name, 0.0)


def set_template(tokenizer, name: str | None) -> int:
    """Give the tokenizer a chat template by name; returns how many tokens had to be added for it."""
    if name is None:
        return 0
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{{ bos_token }}" * adds_bos + {"chatml": CHATML, "vicuna": VICUNA}[name]
    if name == "vicuna":                            # ends turns with the EOS, so it needs no token of its own
        return 0
    return tokenizer.add_tokens([t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()], special_tokens=True)


def end_token_ids(model, tokenizer, turn_end: int) -> list[int]:
    """Every token that ends a response: the template's own, the tokenizer's EOS, what the model's generation knows."""
    known = model.generation_config.eos_token_id
    ids = {turn_end, tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    return sorted(i for i in ids if i < model.get_input_embeddings().num_embeddings)


def model_card(settings: Settings, steps: int) -> str:
    """README.md of the saved folder: where the model comes from, what was done to it, with which settings."""
    def public(name):       # a hub name; of a path, which says nothing elsewhere and may say too much, the last part
        return Path(name).name if located(name).exists() else name

    shown = {name: public(value) if name in ("model", "data", "eval_data") else value for name, value in dataclasses.asdict(settings).items()
             if value is not None and name not in ("out", "resume", "overwrite") and not name.startswith("plan_")}
    written = {"ema": "an exponential moving average of the model itself rewrote a segment of each chosen response",
               "policy": "the model itself rewrote a segment of each chosen response",
               "iteration": "the model as it was at the start of each iteration wrote them", "data": "those of the data"}[settings.rejected]
    front = [f"{key}: {name}" for key, name in (("base_model", settings.model), ("datasets", settings.data.partition(":")[0]))
             if not located(name).exists()]
    return "\n".join([
        "---", *front, "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {method(settings)} of {shown['model']}", "",
        f"`{shown['model']}` trained on `{shown['data']}` with {method(settings)}, {steps} optimizer steps of {settings.batch_size} prompts.",
        *([f"Rejected responses: {written}."] if settings.loss != "sft" else []), "",
        "From the reference code for Self-Augmented Preference Optimization, https://arxiv.org/abs/2405.20830.", "",
        "| setting | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in shown.items()), ""])


def save_model(model, tokenizer, ends: list[int], folder: Path, card: str) -> None:
    """Write an ordinary Hugging Face folder: weights, tokenizer, chat template, every end token for generation, model card.
    It gets its name when it is whole. Raises RunFailed where it can't be written."""
    partial = folder.with_suffix(".partial")
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:          # each format has its own way of saying that the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{folder}: could not save the model ({error_text(error)})") from None
