"""Models and tokenizers: loaded from a folder or the Hub, saved as a Hugging Face folder."""
import contextlib
import dataclasses
import shutil
from pathlib import Path

import huggingface_hub.utils
import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from sapo import refuse_model
from support.chat_templates import set_template
from support.errors import RunFailed, UserError, error_text, printable
from support.files import flush_folder, flush_tree
from support.parallel import out_of_memory
from support.settings import PATHS, Settings, fit_to_positions, located, run_label


def load_model(settings: Settings, world, flag: str = "model"):
    """The policy and its tokenizer; with flag="ref_model", the reference that --ref_model names.

    Weights are fp32 whatever the folder holds: bf16 would round small steps away. With --shard,
    rank 0 has the whole model on its CPU and the other ranks have shapes only (meta device).
    Settles the settings' max_len and max_prompt_len by the positions that the model has.
    Raises UserError where there is no causal language model, where weights are missing or not
    finite, and where prompt and response do not fit.
    """
    asked = getattr(settings, flag)
    name, options = str(located(asked)), hub_options(settings)
    random_init = settings.random_init
    if flag == "ref_model":
        random_init, options["revision"] = False, "main"    # the other settings are the policy's
    shapes_only = world.sharded and not world.is_main
    torch.manual_seed(settings.seed)    # for new weights: --random_init, embeddings of added tokens
    missing = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        config = read_config(settings, flag)
        if random_init or shapes_only:
            with torch.device("meta") if shapes_only else contextlib.nullcontext():
                model = fresh_model(config, torch.float32, settings)
        else:
            with no_progress_bars():
                model, loading = AutoModelForCausalLM.from_pretrained(
                    name, config=config, dtype=torch.float32, output_loading_info=True,
                    **options)
            missing = sorted(loading["missing_keys"])       # without tied weights
    except Exception as error:          # every kind of damage to a folder has an error of its own
        if out_of_memory(error):
            raise
        raise UserError(f"--{flag} {asked}: not a causal language model with its tokenizer "
                        f"({error_text(error)})") from None
    if missing:
        names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        random = ", or start from random weights with --random_init" if flag == "model" else ""
        raise UserError(f"--{flag} {asked}: {len(missing)} of its weights are missing: "
                        f"{names}; save the model again with all of them{random}")
    if not shapes_only:
        refuse_weights_not_finite(f"--{flag} {asked}", model)
    fit_to_positions(settings, positions_of(config), flag)
    added = set_template(tokenizer, settings.chat_template)
    embeddings = model.get_input_embeddings()
    if added and len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not embeddings.weight.is_meta)
    try:                                # saving refuses what loading accepts: find out now
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True    # the usual reason: sampling values without it
    # eval: no dropout, in training either, as in the EMA model and the reference
    return (model if world.sharded else model.to(world.device)).eval(), tokenizer


def read_config(settings: Settings, flag: str = "model"):
    """The configuration in --plan_config or --model; with flag="ref_model", in --ref_model.

    Raises the errors of transformers.

    A window that `use_sliding_window: false` turns off is removed: some models ignore both values,
    others would use the window all the same.
    """
    plan_config = settings.plan_config if flag == "model" else None
    name = str(located(plan_config or getattr(settings, flag)))
    options = hub_options(settings)
    if plan_config or flag == "ref_model":
        options["revision"] = "main"    # --model_revision is of the model
    config = AutoConfig.from_pretrained(name, **options)
    text = config.get_text_config()
    sliding_layers = "sliding_attention" in (getattr(text, "layer_types", None) or [])
    if getattr(text, "use_sliding_window", None) is False and not sliding_layers:
        text.sliding_window = None
    return config


def load_reference(settings: Settings, world, policy, tokenizer):
    """The model that --ref_model names, as DPO's reference for a policy with this tokenizer.

    The two models may differ in shape, but the same id must stand for the same token in both.
    Settles the settings' max_len by the positions of this model too. Raises UserError where the
    vocabularies differ, and where load_model does.
    """
    model, own_tokenizer = load_model(settings, world, "ref_model")
    try:
        refuse_model(model, "--ref_model", "")
    except ValueError as error:
        raise UserError(f"--ref_model {settings.ref_model}: {error}") from None
    own, needed = own_tokenizer.get_vocab(), tokenizer.get_vocab()
    other = next((token for token, number in needed.items() if own.get(token) != number), None)
    if other is not None:
        raise UserError(f"--ref_model {settings.ref_model}: its vocabulary is not that of --model: "
                        f"the token {printable(other)!r} has the id {needed[other]} there and "
                        f"{own.get(other, 'none')} here")
    # Ids beyond the policy's own embedding never occur.
    ids = min(max(needed.values()) + 1, policy.get_input_embeddings().num_embeddings)
    size = model.get_input_embeddings().num_embeddings
    if size < ids:
        raise UserError(f"--ref_model {settings.ref_model}: its embedding has {size} entries, too "
                        f"few for the {ids} tokens of --model {settings.model}")
    return model


def hub_options(settings: Settings) -> dict:
    """What every from_pretrained is given: the revision, and whether to run a model's code."""
    return {"revision": settings.model_revision or "main",
            "trust_remote_code": settings.trust_remote_code}


def positions_of(config) -> int | None:
    """Most tokens that a model of this configuration reads, None where nothing limits them.

    With longrope (Phi 3.5), as many as its short factors are for: once a sequence is longer, all
    its positions are rotated in another way, and the keys in the KV cache no longer fit.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings"):
        return rope["original_max_position_embeddings"]
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if getattr(text, name, None):
            return getattr(text, name)
    return None


def fresh_model(config, dtype, settings: Settings):
    """A model of that shape with random weights; on the meta device, with shapes only."""
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    model.tie_weights()         # transformers 5.0 leaves that out on the meta device
    return model


def refuse_weights_not_finite(source: str, model) -> None:
    """Raise UserError, with the weight's name, where a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{source}: the weight {name} has NaN or infinite "
                            "values; take a model whose weights are all finite")


@contextlib.contextmanager
def no_progress_bars():
    """No bars of loading and saving inside. Bars of downloads stay: downloads take minutes."""
    shown = logging.is_progress_bar_enabled()
    downloads_shown = not huggingface_hub.utils.are_progress_bars_disabled()
    logging.disable_progress_bar()      # of downloads too
    if downloads_shown:
        huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
            if not downloads_shown:
                huggingface_hub.utils.disable_progress_bars()


def checkpoint_layers(model) -> None:
    """Gradient checkpointing: each decoder layer keeps its input only. Dropout stays off."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable      # the older name
    enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # transformers checkpoints in training mode only; the layer's parts stay in eval mode
            layer.training = True
            for name, value in vars(layer).items():
                if name.endswith("dropout") and isinstance(value, float):   # the layer's own (OPT)
                    setattr(layer, name, 0.0)


def end_token_ids(model, tokenizer, turn_end: int) -> list[int]:
    """Ids of all tokens that end a response, sorted.

    They are the template's own, the tokenizer's EOS and those in the model's generation config.
    """
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    ids = {turn_end, tokenizer.eos_token_id, *known} - {None}
    return sorted(i for i in ids if i < model.get_input_embeddings().num_embeddings)


def model_card(settings: Settings, steps: int, is_ema: bool = False) -> str:
    """README.md of the saved folder: where the model comes from, what was done to it, and how.

    Hub names are given in full. Of a path, only the last part is: the rest says nothing elsewhere
    and may say too much. is_ema: the weights are those of the EMA model.
    """
    def public(value):
        value = Path(value).name if located(value).exists() else value
        return printable(value).replace("`", "'")

    data_name = settings.data.partition(":")[0]
    from_hub = not located(settings.model).exists() and not settings.random_init
    front = ModelCardData(
        base_model=settings.model if from_hub else None,
        datasets=None if located(data_name).exists() else [data_name],
        library_name="transformers", pipeline_tag="text-generation")
    label, data = run_label(settings), public(settings.data)
    if settings.random_init:
        title, origin = f"{label} from random weights", "A model with random weights"
    else:
        title, origin = f"{label} of {public(settings.model)}", f"`{public(settings.model)}`"
    lines = ["---", front.to_yaml(), "---", f"# {title}", "",
             f"{origin}, trained on `{data}` with {label}: {steps} optimizer steps of "
             f"{settings.batch_size} prompts."]
    if settings.loss != "sft":
        written = {
            "ema": "an exponential moving average of the model rewrote a segment of each chosen "
                   "response",
            "policy": "the model itself rewrote a segment of each chosen response",
            "spin": "the model as it was at the start of each round wrote them",
            "data": "those of the data"}
        lines.append(f"Rejected responses: {written[settings.rejected]}.")
    if is_ema:
        lines.append("The weights are those of the exponential moving average of the model.")
    lines += ["", "From the reference code for Self-Augmented Preference Optimization, "
              "https://arxiv.org/abs/2405.20830.", "", "| setting | value |", "| --- | --- |"]
    for name, value in dataclasses.asdict(settings).items():
        if value is None or name in ("out", "resume", "overwrite") or name.startswith("plan_"):
            continue
        if name in PATHS:
            value = public(value)
        lines.append(f"| {name} | {str(value).replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def save_model(model, tokenizer, eos_ids: list[int], folder: Path, card: str) -> None:
    """Write an ordinary Hugging Face folder.

    It holds weights, tokenizer, chat template, all end tokens for generation and the model card.
    The folder gets its name when it is complete. Raises RunFailed where it can't be written.
    """
    partial = folder.with_suffix(".partial")
    model.generation_config.eos_token_id = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with no_progress_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        flush_folder(folder.parent)
    except Exception as error:          # each format says in its own way that the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{folder}: could not save the model ({error_text(error)})") from None
