"""SAPO-DPO with LoRA: policy, EMA model and reference are adapters on one base.

    pip install -r examples/requirements.txt
    python examples/lora.py

Takes about 40 seconds of one core and prints:

    step  1: loss 0.693147, of full copies 0.693147
    step  5: loss 0.673184, of full copies 0.673184
    step 10: loss 0.658488, of full copies 0.658488
    step 15: loss 0.647961, of full copies 0.647961
    step 20: loss 0.710053, of full copies 0.710053
    SmolLM2-135M's shape in fp32, policy, EMA model and reference:
      one base and two adapters    557.6 MB
      three full copies           1614.2 MB

What changes in the calls of the modules:
- EMA(policy, trainable_only=True): the copy shares the base with the policy and has an adapter of
  its own. The average is taken of the two factors of each adapter, not of their product.
- The reference is the base: pair_logps(policy, ...) inside `with policy.disable_adapter()`.
- A reference that moves (train.py's --ref ema) is a third adapter:
  reference = EMA(policy, decay=0, update_every=108, trainable_only=True), after each step
  reference.update(ema.model), and pair_logps(reference.model, ...).
- find_shortcuts(policy) is called after peft has wrapped the model.
- Merge the adapter into a deep copy only (full_copy below): merge_and_unload writes into the base,
  which the EMA model shares.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # where the modules are

import copy
import json

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss
from sapo import find_shortcuts, make_pairs, pair_logps

SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)


def with_adapter(model):
    """The model with a LoRA adapter: the base is frozen, the adapter starts as no change."""
    return get_peft_model(model, LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def full_copy(model):
    """A model of its own, with the adapter merged into the weights."""
    return copy.deepcopy(model).merge_and_unload()


def mean_loss(policy, reference):
    """DPO's loss from what pair_logps gave for the two."""
    losses, _, _ = dpo_loss(policy.chosen_logps, policy.rejected_logps,
                            reference.chosen_logps, reference.rejected_logps, beta=0.1)
    return losses.mean()


def train(base, examples, eos_token_id: int, steps: int = 20, batch_size: int = 16):
    """SAPO-DPO of an adapter. Returns the policy, the EMA model and the losses of all steps.

    Each loss stands beside the loss of two full copies, which hold the same adapters merged.
    """
    frozen_copy = copy.deepcopy(base)
    policy = with_adapter(base)
    ema = EMA(policy, decay=0.5, update_every=2, trainable_only=True)
    shortcuts = find_shortcuts(policy)
    buffer, rng = ReplayBuffer(capacity=512), np.random.default_rng(0)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    all_losses = []
    for step in range(1, steps + 1):
        minibatch = [examples[i] for i in rng.integers(len(examples), size=batch_size)]
        for pair in make_pairs(ema.model, minibatch, 28, rng, eos_token_id=eos_token_id):
            buffer.add(pair)
        pairs = buffer.sample(batch_size)
        options = {"skip_shared": True, "shortcuts": shortcuts}
        with torch.no_grad(), policy.disable_adapter():         # the reference: the base alone
            reference_logps = pair_logps(policy, pairs, **options)
        loss = mean_loss(pair_logps(policy, pairs, **options), reference_logps)
        with torch.no_grad():                                   # the same with full copies
            loss_of_copies = mean_loss(pair_logps(full_copy(policy), pairs, skip_shared=True),
                                       pair_logps(frozen_copy, pairs, skip_shared=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(policy)
        all_losses.append((loss.item(), loss_of_copies.item()))
        if step == 1 or step % 5 == 0:
            print(f"step {step:2}: loss {loss:.6f}, of full copies {loss_of_copies:.6f}")
    return policy, ema.model, all_losses


def megabytes(*models) -> float:
    """Memory of the weights and buffers of these models, what they share counted once."""
    tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(sizes.values()) / 1e6


def compare_memory(config: LlamaConfig) -> tuple[float, float]:
    """Megabytes of policy, EMA model and reference: with adapters on one base, and as copies."""
    policy = with_adapter(LlamaForCausalLM(config))
    ema = EMA(policy, trainable_only=True)
    # The reference is the policy with its adapter off.
    return megabytes(policy, ema.model), megabytes(*(full_copy(policy) for _ in range(3)))


def load_examples(tokenizer) -> list[tuple[list[int], list[int]]]:
    """The embedded rows as (prompt, chosen response), token ids."""
    with open("data/train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"],
             [*tokenizer.encode(row["chosen"][0]["content"], add_special_tokens=False),
              tokenizer.eos_token_id]) for row in rows]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("data/model")
    model = AutoModelForCausalLM.from_pretrained("data/model", dtype="float32")
    train(model, load_examples(tokenizer), tokenizer.eos_token_id)
    shared, copies = compare_memory(LlamaConfig(**SMOLLM2_135M))
    print(f"SmolLM2-135M's shape in fp32, policy, EMA model and reference:\n"
          f"  one base and two adapters  {shared:7.1f} MB\n"
          f"  three full copies          {copies:7.1f} MB")


if __name__ == "__main__":
    main()
