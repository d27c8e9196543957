"""--dry_run: what a run would be, from the shape of its model alone: parameters, steps, tokens, memory a GPU.

The model and its training step are built on the meta device, where tensors have a shape and no content, so that neither
weights nor data nor a network is needed: a config.json and a number of rows will do.
"""
import math
from collections import Counter
from unittest import mock

import torch
from transformers import AutoConfig

from sapo import LOGITS_AT_ONCE, Pair, pair_logps
from support.models import fresh_model
from support.data_formats import read_rows
from support.tokenize_rows import held_out_every, selected
from support.errors import UserError, error_text
from support.settings import Settings, located, method

GIB = 2 ** 30


def plan(s: Settings, processes: int) -> str:
    """The dry run's report, as printed. Raises UserError where the shape or the number of rows can't be found out.

    Tokens and memory are upper bounds: as if every prompt were short, every response as long as --max_len allows, and no
    prefix shared. processes: those that torchrun started; --plan_processes says otherwise.
    """
    processes = s.plan_processes or processes
    config = read_config(s)
    s.max_len = min(s.max_len, getattr(config.get_text_config(), "max_position_embeddings", None) or s.max_len)
    rows, where = count_rows(s)
    try:
        with torch.device("meta"):
            model = fresh_model(config, torch.bfloat16 if s.dtype == "bf16" else torch.float32, s).eval()
        by_part, peak, saved = memory(s, model, processes)
    except Exception as error:          # no causal model, or one whose Python needs more than shapes
        raise UserError(f"--dry_run: {config.model_type}: its training step can't be built without weights ({error_text(error)})") from None
    held = 0 if s.eval_data or not s.eval_rows else rows // held_out_every(rows)
    steps = s.steps or math.ceil(s.epochs * (rows - held) / s.batch_size) * s.iterations
    scored = s.batch_size * (s.num_rejected if s.generates and not s.buffer_size else 1) * (s.max_len if s.loss == "sft" else 2 * s.max_len)
    new = min(s.segment_len or s.max_new_tokens, s.max_len) * s.num_rejected
    in_iteration = min(rows - held, math.ceil(steps / s.iterations) * s.batch_size)
    answered = s.iterations * in_iteration if s.rejected == "iteration" else steps * s.batch_size
    written = answered * new if s.generates else 0
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"dry run: {method(s)}",
             f"  model     {s.model}: {type(model).__name__}, {parameters / 1e6:.2f} M parameters",
             f"  data      {s.data}: {rows} rows{where}, {held} of them held out",
             f"  steps     {steps} of {s.batch_size} prompts" + (f", in {s.iterations} iterations" if s.iterations > 1 else ""),
             f"  tokens    at most {steps * scored / 1e6:.1f} M scored, {written / 1e6:.1f} M written",
             f"  memory    a process, of {processes}, {'cut up with --shard' if s.shard and processes > 1 else 'each with its own copy'}, --dtype {s.dtype}:"]
    lines += [f"    {name:<50}{size / GIB:8.2f} GiB{size / parameters:8.2f} bytes a parameter" for name, size in by_part.items()]
    lines += [f"    {'peak, at most':<50}{peak / GIB:8.2f} GiB",
              f"  disk      {saved / GIB:.1f} GiB a checkpoint, {s.keep} of them and the one being written; {4 * parameters / GIB:.1f} GiB the model"]
    return "\n".join(lines)


def read_config(s: Settings):
    name = str(located(s.plan_config or s.model))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=s.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        flag = f"--plan_config {s.plan_config}" if s.plan_config else f"--model {s.model}"
        raise UserError(f"{flag}: no model's shape there ({error_text(error)}); --plan_config takes a config.json") from None


def count_rows(s: Settings) -> tuple[int, str]:
    if s.plan_rows and not located(s.data).exists():
        return len(selected(s.rows, s.data, range(s.plan_rows))), " (by --plan_rows)"
    return len(selected(s.rows, s.data, read_rows(s.data))), ""


def memory(s: Settings, model, processes: int) -> tuple[dict[str, float], float, float]:
    """Bytes a process needs, by part, and their peak: what stays, and the larger of scoring and generating. And those of a
    checkpoint on the disk."""
    parameters = sum(p.numel() for p in model.parameters())
    shares = processes if s.shard else 1
    parts = {"policy": 4, "gradients": 4, f"optimizer ({s.optimizer})": 4 if s.optimizer == "rmsprop" else 8}
    if s.generates and s.rejected == "ema" or s.ref == "ema":
        parts["EMA model"] = 4
    if s.ref or s.rejected == "iteration":
        parts["reference" if s.loss == "dpo" else "the iteration's start"] = 4
    saved = (sum(parts.values()) - parts["gradients"]) * parameters
    parts = {name: size * parameters / shares for name, size in parts.items()}
    logits = min(LOGITS_AT_ONCE, 2 * s.max_len * s.micro_batch * model.get_input_embeddings().num_embeddings)
    # Three times the logits of a chunk (themselves, normalised, their gradient), and the gradient of the largest matrix.
    scoring = activations(s, model) + 4 * (3 * logits + max(p.numel() for p in model.parameters()))
    width = 2 if s.dtype == "bf16" else 4
    if shares > 1:      # what lies outside the layers, and two layers, gathered, with their gradients
        scoring += 2 * width * gathered(model)
    elif s.dtype == "bf16":
        scoring += 2 * parameters           # autocast keeps the weights it casts until backward is through
    parts["scoring: activations, logits" + (", layers gathered" if shares > 1 else "")] = scoring
    generating = width * parameters if shares > 1 or s.dtype == "bf16" else 0       # a copy to generate and evaluate with
    if s.generates:
        generating += writing(s, model, processes, width)
    parts["generating: copy of the model, KV cache, prefixes" if s.generates else "evaluating: copy of the model"] = generating
    return parts, sum(parts.values()) - min(scoring, generating), saved


def activations(s: Settings, model) -> float:
    """Bytes that backward needs of one micro-batch of the longest pairs: what autograd keeps of a real forward pass on
    the meta device."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, probabilities = {}, 2 * s.max_len * s.micro_batch        # storage -> bytes

    def keep(tensor):
        square = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] and tensor.shape[-1] > 1
        # On meta, attention is composed of plain products; the fused kernels that run elsewhere keep no probabilities.
        if tensor.untyped_storage()._cdata not in own and not (square and tensor.numel() // tensor.shape[-1] > probabilities):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    model._sapo_exact, model._sapo_generates = (True, True), False
    length = s.max_len - 1
    pair = Pair([1], [1] * length, [1] * length, length if s.loss == "sft" else 0)
    known = torch.is_autocast_enabled       # torch 2.9 raises when transformers asks this of the meta device
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
         mock.patch("torch.is_autocast_enabled", lambda *device: device != ("meta",) and known(*device)):
        pair_logps(model, [pair] * s.micro_batch)
    total, layers = sum(storage.nbytes() for storage in kept.values()), model.config.get_text_config().num_hidden_layers
    one = total / layers        # what a layer keeps; backward holds about as much in gradients while it goes through one
    if not s.grad_checkpoint:
        return total + one
    tokens = s.micro_batch * s.max_len * (1 if s.loss == "sft" else 2)
    return 2 * one + layers * tokens * model.config.get_text_config().hidden_size * (2 if s.dtype == "bf16" else 4)


def gathered(model) -> int:
    """Parameters that a sharded model holds whole while it scores: those outside the layers, and two layers."""
    sizes = Counter()
    for name, p in model.named_parameters():
        numbers = [part for part in name.split(".") if part.isdigit()]
        sizes[numbers[0] if numbers else ""] += p.numel()
    layers = [size for number, size in sizes.items() if number]
    return sizes[""] + 2 * max(layers, default=0)


def writing(s: Settings, model, processes: int, width: int) -> float:
    """Bytes of one batch of responses: the KV cache, and what a layer makes of the prefixes, which are read a quarter at a time."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ahead = s.ema_every if s.rejected == "ema" else 1
    rows = s.generate_batch if s.rejected == "iteration" else min(s.generate_batch, -(-s.batch_size // processes) * s.num_rejected * ahead)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    tokens = max(4, -(-rows // 4)) * s.max_len
    layer = tokens * width * (6 * config.hidden_size + 3 * inner + s.max_len)      # the last: their attention mask
    return 2 * config.num_hidden_layers * rows * s.max_len * heads * size * width + layer
