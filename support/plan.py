"""--dry_run: what a run would be, from the shape of its model alone.

Parameters, steps, tokens and memory per GPU. The model and one scoring pass are built on the meta
device, where tensors have a shape and no content: no weights, no data and no network are needed, a
config.json and a number of rows are enough.
"""
import math
from collections import Counter
from unittest import mock

import torch

from sapo import LOGITS_AT_ONCE, head_logps
from support.data_formats import read_rows
from support.errors import UserError, error_text
from support.models import fresh_model, positions_of, read_config
from support.settings import Settings, fit_to_positions, located, run_label
from support.tokenize_rows import holdout_interval, select_rows

GIB = 2 ** 30


def plan(s: Settings, processes: int) -> str:
    """The dry run's report, as printed.

    Tokens and memory are upper bounds: every prompt short, every response as long as --max_len
    allows, no prefix shared. processes: those that torchrun started; --plan_processes overrides it.
    Raises UserError where the model's shape or the number of rows can't be found out.
    """
    processes = s.plan_processes or processes
    try:
        config = read_config(s)
    except (OSError, ValueError, KeyError) as error:
        flag = f"--plan_config {s.plan_config}" if s.plan_config else f"--model {s.model}"
        raise UserError(f"{flag}: no model's shape there ({error_text(error)}); --plan_config "
                        "takes a config.json") from None
    try:
        reference_config = read_config(s, "ref_model") if s.ref_model else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--ref_model {s.ref_model}: no model's shape there "
                        f"({error_text(error)})") from None
    fit_to_positions(s, positions_of(config))
    rows, where = count_rows(s)
    asked, changed = s.micro_batch, logit_changes(config)
    try:
        with torch.device("meta"):
            dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
            model = fresh_model(config, dtype, s).eval()
            reference = fresh_model(reference_config, dtype, s) if s.ref_model else None
        vocab_size = model.get_input_embeddings().num_embeddings
        s.micro_batch = micro_batch_for(s, vocab_size, split_head=not changed)
        by_part, peak, saved = memory(s, model, processes, reference)
    except Exception as error:          # no causal model, or one that needs more than shapes
        raise UserError(f"--dry_run: {config.model_type}: its training step can't be built without "
                        f"weights ({error_text(error)})") from None
    steps, held, scored, written = counts(s, rows)
    parameters = sum(p.numel() for p in model.parameters())
    logits = "logits in chunks, as the configuration neither scales nor caps them"
    if changed:
        logits = f"logits of all positions at once, because of {', '.join(changed)}"
    lowered = f" (lowered from {asked})" if s.micro_batch < asked else ""
    rounds = f", in {s.iterations} rounds" if s.iterations > 1 else ""
    sharing = "sharded" if s.shard and processes > 1 else "each with its own copy"
    lines = [
        f"dry run: {run_label(s)}",
        f"  model     {s.model}: {type(model).__name__}, {parameters / 1e6:.2f} M parameters",
        f"  data      {s.data}: {rows} rows{where}, {held} of them held out",
        f"  steps     {steps} of {s.batch_size} prompts{rounds}",
        f"  tokens    at most {scored / 1e6:.1f} M scored, {written / 1e6:.1f} M written",
        f"  scoring   micro-batches of {s.micro_batch} pairs{lowered}; {logits}",
        f"  memory    per process, of {processes}, {sharing}, --dtype {s.dtype}:"]
    lines += [f"    {name:<50}{size / GIB:8.2f} GiB{size / parameters:8.2f} bytes per parameter"
              for name, size in by_part.items()]
    return "\n".join([
        *lines, f"    {'peak, at most':<50}{peak / GIB:8.2f} GiB",
        f"  disk      {saved / GIB:.1f} GiB per checkpoint, {s.keep} of them and the one being "
        f"written; {4 * parameters / GIB:.1f} GiB the model"])


def count_rows(s: Settings) -> tuple[int, str]:
    """How many rows there are, and how that is known."""
    dropped = ", before --drop_long_prompts" if s.drop_long_prompts else ""
    if s.plan_rows and not located(s.data).exists():
        return len(select_rows(s.rows, s.data, range(s.plan_rows))), " (by --plan_rows)" + dropped
    return len(select_rows(s.rows, s.data, read_rows(s.data, s.data_revision))), dropped


def counts(s: Settings, rows: int) -> tuple[int, int, int, int]:
    """Optimizer steps, held-out rows, and most tokens that the run scores and writes."""
    held = 0 if s.eval_data or not s.eval_rows else rows // holdout_interval(rows)
    per_round = math.ceil(s.epochs * (rows - held) / s.batch_size)
    steps = s.steps or per_round * s.iterations
    pairs = s.batch_size * (s.num_rejected if s.generates and not s.buffer_size else 1)
    scored = steps * pairs * s.max_len * (1 if s.loss == "sft" else 2)
    answered = steps * s.batch_size         # chosen responses that a model rewrites
    if s.rejected == "spin":                # once per round
        answered = s.iterations * min(rows - held,
                                      math.ceil(steps / s.iterations) * s.batch_size)
    longest = max(s.segment_len, s.max_new_tokens) if s.tail == "rewrite" else (
        s.segment_len or s.max_new_tokens)
    new_tokens = min(longest, s.max_len) * s.num_rejected
    return steps, held, scored, answered * new_tokens if s.generates else 0


# --------------------------------------------------------------------------------------- memory

def logit_changes(config) -> list[str]:
    """Entries of a configuration that scale or cap the logits behind the output embeddings.

    Such a model's logits can't be computed from its hidden states in chunks. Nothing can be tried
    on the meta device, so the plan goes by these names: soft caps of Gemma, RecurrentGemma and
    NanoChat, scales of Cohere, Granite, HyperCLOVA X, Falcon H1 and others.
    """
    text = config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling",
             "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
    return [name for name in names if getattr(text, name, None) not in (None, 0, 1)]


def micro_batch_for(settings: Settings, vocab_size: int, split_head: bool) -> int:
    """Pairs to score at a time, so that their logits stay within sapo.LOGITS_AT_ONCE.

    split_head: the logits of scored tokens can be computed in chunks, so that --micro_batch holds.
    Otherwise the logits of every position are there at once, 2 sequences x max_len x vocab_size per
    pair. At least 1, at most --micro_batch.
    """
    if split_head:
        return settings.micro_batch
    per_pair = 2 * settings.max_len * vocab_size
    return max(1, min(settings.micro_batch, LOGITS_AT_ONCE // per_pair))


def memory(s: Settings, model, processes: int,
           reference=None) -> tuple[dict[str, float], float, float]:
    """Bytes that a process needs, by part; their peak; bytes of a checkpoint on the disk.

    reference: the model that --ref_model names; None: the reference has the shape of `model`.

    The peak is what stays, and the larger of scoring and generating.
    """
    parameters = sum(p.numel() for p in model.parameters())
    shares = processes if s.shard else 1
    parts = {"policy": 4, "gradients": 4,
             f"optimizer ({s.optimizer})": 4 if s.optimizer == "rmsprop" else 8}
    if s.needs_ema:
        parts["EMA model"] = 4
    if s.ref or s.rejected == "spin":
        parts["reference" if s.loss == "dpo" else "policy at the start of the round"] = 4
    parts = {name: size * parameters for name, size in parts.items()}
    if reference is not None:
        parts["reference"] = 4 * sum(p.numel() for p in reference.parameters())
    saved = sum(parts.values()) - parts["gradients"]
    if s.save_pairs:
        parts["start model, for --save_pairs"] = 4 * parameters
    parts = {name: size / shares for name, size in parts.items()}
    # and the gradient of the largest matrix
    scoring = activations(s, model) + logits(s, model)
    scoring += 4 * max(p.numel() for p in model.parameters())
    width = 2 if s.dtype == "bf16" else 4
    if shares > 1:      # gathered, with their gradients
        scoring += 2 * width * gathered(model)
    elif s.dtype == "bf16":
        scoring += 2 * parameters       # autocast keeps the cast weights until backward ends
    layers_gathered = ", layers gathered" if shares > 1 else ""
    parts[f"scoring: activations, logits{layers_gathered}"] = scoring
    # a copy of the model to generate and evaluate with
    generating = width * parameters if shares > 1 or s.dtype == "bf16" else 0
    name = "evaluating: copy of the model"
    if s.generates:
        generating += writing(s, model, processes, width)
        name = "generating: copy of the model, KV cache, prefixes"
    parts[name] = generating
    return parts, sum(parts.values()) - min(scoring, generating), saved


def logits(s: Settings, model) -> int:
    """Bytes of the logits while one micro-batch is scored, in fp32.

    Three copies of those held at once: themselves, normalised, their gradient. A soft cap keeps one
    more, before the cap. Measured on a CPU: 3.0 and 4.0 copies, in bf16 less.
    """
    changed = logit_changes(model.config)
    count = 2 * s.max_len * s.micro_batch * model.get_input_embeddings().num_embeddings
    if not changed:
        count = min(LOGITS_AT_ONCE, count)
    capped = any("cap" in name for name in changed)
    return 4 * (4 if capped else 3) * count


def activations(s: Settings, model) -> float:
    """Bytes that backward needs of the longest micro-batch.

    They are what autograd keeps of a real forward pass on the meta device. Logits of a large
    vocabulary are not among them: those are computed again, chunk by chunk (see `logits`).
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, probabilities = {}, 2 * s.max_len * s.micro_batch        # storage -> bytes

    def keep(tensor):
        square = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] and tensor.shape[-1] > 1
        # On the meta device attention is made of plain products; the fused kernels that run
        # elsewhere keep no probabilities.
        fused = square and tensor.numel() // tensor.shape[-1] > probabilities
        if tensor.untyped_storage()._cdata not in own and not fused:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    text = model.config.get_text_config()
    length = s.max_len if s.loss == "sft" else 2 * s.max_len
    known = torch.is_autocast_enabled       # torch 2.9 raises when asked about the meta device
    with torch.device("meta"), \
         torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
         mock.patch("torch.is_autocast_enabled",
                    lambda *device: device != ("meta",) and known(*device)):
        ids = torch.ones(s.micro_batch, length, dtype=torch.long)
        position_ids = torch.arange(length)[None].expand(s.micro_batch, -1) % s.max_len
        mask = torch.zeros(s.micro_batch, 1, length, length, dtype=model.dtype)
        if len(set(getattr(text, "layer_types", None) or [])) > 1:
            mask = {kind: mask.clone() for kind in set(text.layer_types)}
        hidden = model.base_model(input_ids=ids, position_ids=position_ids, attention_mask=mask,
                                  use_cache=False).last_hidden_state
        head_logps(model.get_output_embeddings(), hidden.flatten(0, 1), ids.flatten())
    total = sum(storage.nbytes() for storage in kept.values())
    # what a layer keeps; backward holds about as much in gradients while it goes through one
    one = total / text.num_hidden_layers
    if not s.grad_checkpoint:
        return total + one
    inputs = ids.numel() * text.hidden_size * (2 if s.dtype == "bf16" else 4)
    return 2 * one + text.num_hidden_layers * inputs


def gathered(model) -> int:
    """Parameters that a sharded model gathers to score: those outside the layers, two layers."""
    sizes = Counter()
    for name, p in model.named_parameters():
        numbers = [part for part in name.split(".") if part.isdigit()]
        sizes[numbers[0] if numbers else ""] += p.numel()
    layers = [size for number, size in sizes.items() if number]
    return sizes[""] + 2 * max(layers, default=0)


def writing(s: Settings, model, processes: int, width: int) -> float:
    """Bytes of one batch of responses: the KV cache, and what one layer makes of the prefixes.

    Prefixes are read a quarter at a time. width: bytes per number.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sequences = s.generate_batch
    if s.rejected != "spin":
        ahead = s.ema_every if s.rejected == "ema" else 1
        per_step = -(-s.batch_size // processes) * s.num_rejected
        sequences = min(s.generate_batch, per_step * ahead)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    tokens = max(4, -(-sequences // 4)) * s.max_len
    # the last of the three is the attention mask
    layer = tokens * width * (6 * config.hidden_size + 3 * inner + s.max_len)
    cache = 2 * config.num_hidden_layers * sequences * s.max_len * heads * size * width
    return cache + layer
