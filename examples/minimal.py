r"""SAPO-ORPO with nothing but the modules, transformers and a list of (prompt, answer) strings.

    python examples/minimal.py

Takes about 18 seconds of one core and prints (a batch's loss varies more than 20 steps change it):

    step 10: loss 0.0517
    step 20: loss 0.1209
    x: '5, pans 2, bags 6. What is the total?<|im_end|>\n<|im_start|>assistant\n'
    A: 'keys: 2 * 5 = 10, total 10'
    B C: '\npans: 2 * 2 = 4, total 14\nbags: 5 * 6 = 30, total 44\nTotal: 44<|im_end|>'
    B' C: '\npans: 2 * 2 = 4, total 24\nbags: 5 * 6 = 30, total 44\nTotal: 44<|im_end|>'
"""
import sys

sys.path.insert(0, ".")     # where the modules are

import json

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from buffer import ReplayBuffer
from ema import EMA
from losses import orpo_loss
from sapo import make_pairs, pair_logps

policy = AutoModelForCausalLM.from_pretrained("data/model", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("data/model")
eos = tokenizer.eos_token_id
with open("data/train.jsonl", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
texts = [(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False),
          row["chosen"][0]["content"]) for row in rows]                 # (prompt, answer) strings
examples = [(tokenizer.encode(x, add_special_tokens=False),
             [*tokenizer.encode(y, add_special_tokens=False), eos]) for x, y in texts]

torch.manual_seed(0)
ema = EMA(policy, decay=0.5, update_every=2)
buffer, rng = ReplayBuffer(capacity=512), np.random.default_rng(0)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
for step in range(1, 21):
    minibatch = [examples[i] for i in rng.integers(len(examples), size=16)]
    for pair in make_pairs(ema.model, minibatch, segment_len=28, rng=rng, eos_token_id=eos):
        buffer.add(pair)                # x, A B C and A B' C
    pairs = buffer.sample(16)           # the least used most likely
    chosen_logps, rejected_logps, chosen_nll = pair_logps(policy, pairs, average=True)
    losses, _, _ = orpo_loss(chosen_logps, rejected_logps, chosen_nll, lam=0.05)
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    ema.update(policy)
    if step % 10 == 0:
        print(f"step {step}: loss {losses.mean():.4f}")
pair = max(pairs, key=lambda pair: pair.chosen != pair.rejected)        # one that is not identical
print(f"x: {tokenizer.decode(pair.prompt)[-70:]!r}")
print(f"A: {tokenizer.decode(pair.chosen[:pair.start])!r}")
print(f"B C: {tokenizer.decode(pair.chosen[pair.start:])!r}")
print(f"B' C: {tokenizer.decode(pair.rejected[pair.start:])!r}")
