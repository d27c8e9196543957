"""SAPO-ORPO inside transformers.Trainer.

    pip install -r examples/requirements.txt
    python examples/trainer.py
    torchrun --nproc_per_node 2 examples/trainer.py

Takes about 17 seconds of one core with the second command and prints:

    {'loss': '0.05492', 'grad_norm': '0.6494', 'learning_rate': '0.0001', 'epoch': '0.01597'}
    {'loss': '0.0667', 'grad_norm': '1.196', 'learning_rate': '0.0001', 'epoch': '0.03195'}
    {'loss': '0.07046', 'grad_norm': '0.9012', 'learning_rate': '0.0001', 'epoch': '0.04792'}
    {'loss': '0.06097', 'grad_norm': '0.9041', 'learning_rate': '0.0001', 'epoch': '0.0639'}
    {'train_runtime': '16.42', ...}

Traps of such a host:
- Load the policy in fp32: with a high decay an EMA model in bf16 stalls.
- Where weights are random (new adapters), seed all processes alike before. DDP gives the policy of
  every process the weights of the first one, but not the EMA models that were copied before.
- Make the EMA model before the Trainer. A host may replace the forward of the model (for mixed
  precision, for instance); a copy made after that may run the policy. EMA refuses such a model.
- Give the Trainer PairScorer(policy), and call what compute_loss is given. With several processes
  that is DDP around the scorer, and DDP synchronises gradients for calls of itself alone.
- Make pairs in compute_loss, not in the data set or the collator: the Trainer fetches batches
  ahead, so those would write with the EMA model of a step before.
- Move the EMA model in on_step_end, which comes once per optimizer step; compute_loss is called
  once per micro-batch.
- Switch dropout off again: the Trainer puts the model in training mode before each micro-batch.
  In eval mode transformers does no gradient checkpointing.
- Several GPUs need torchrun. In a single process the Trainer takes DataParallel, which does not
  split a list of pairs: every GPU would get all of them.
- Trainer.evaluate calls the scorer with the batch itself, not with pairs. Evaluate in another way.
- Save the policy. The Trainer's own checkpoints hold the scorer, but not the EMA model and not the
  buffer (both have state_dict). With tied weights, as here, the Trainer can't write one at all.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # where the modules are

import json

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from buffer import ReplayBuffer
from ema import EMA
from losses import orpo_loss
from sapo import PairScorer, find_shortcuts, make_pairs


class Sapo(TrainerCallback):
    """What SAPO adds to a training loop: pairs that the EMA model makes, and the EMA model's moves.

    rank: of this process, so that each process samples something else.
    """

    def __init__(self, policy, eos_token_id: int, rank: int = 0, segment_len: int = 28):
        self.policy, self.eos_token_id, self.segment_len = policy, eos_token_id, segment_len
        self.ema = EMA(policy, decay=0.5, update_every=2)
        self.buffer, self.rng = ReplayBuffer(capacity=512, seed=rank), np.random.default_rng(rank)
        self.generator = torch.Generator(policy.device).manual_seed(rank)

    def new_batch(self, examples: list) -> list:
        """Algorithm 1 lines 7 to 14: rewrite, add to the buffer, draw as many pairs."""
        for pair in make_pairs(self.ema.model, examples, self.segment_len, self.rng,
                               eos_token_id=self.eos_token_id, generator=self.generator):
            self.buffer.add(pair)
        return self.buffer.sample(len(examples))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Line 17, after each optimizer step."""
        self.ema.update(self.policy)


class SapoTrainer(Trainer):
    """A Trainer whose model is a PairScorer and whose batches are lists of examples."""

    def __init__(self, sapo: Sapo, **kwargs):
        super().__init__(callbacks=[sapo], data_collator=lambda rows: {"examples": rows}, **kwargs)
        self.sapo = sapo

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Line 15. model: the scorer, or DDP around it."""
        model.eval()
        pairs = self.sapo.new_batch(inputs["examples"])
        chosen_logps, rejected_logps, chosen_nll = model(pairs, average=True)
        losses, _, _ = orpo_loss(chosen_logps, rejected_logps, chosen_nll, lam=0.05)
        return losses.mean()


def load_examples(tokenizer) -> list[tuple[list[int], list[int]]]:
    """The embedded rows as (prompt, chosen response), token ids."""
    with open("data/train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"],
             [*tokenizer.encode(row["chosen"][0]["content"], add_special_tokens=False),
              tokenizer.eos_token_id]) for row in rows]


def main() -> None:
    args = TrainingArguments(
        output_dir="runs/trainer", max_steps=20, per_device_train_batch_size=16, learning_rate=1e-4,
        lr_scheduler_type="constant", logging_steps=5, disable_tqdm=True, save_strategy="no",
        report_to="none", remove_unused_columns=False, ddp_find_unused_parameters=False)
    policy = AutoModelForCausalLM.from_pretrained("data/model", dtype="float32").to(args.device)
    tokenizer = AutoTokenizer.from_pretrained("data/model")
    sapo = Sapo(policy, tokenizer.eos_token_id, args.process_index)
    scorer = PairScorer(policy, find_shortcuts(policy))
    trainer = SapoTrainer(sapo, model=scorer, args=args, train_dataset=load_examples(tokenizer))
    trainer.train()
    if trainer.is_world_process_zero():
        policy.save_pretrained("runs/trainer/final")
        tokenizer.save_pretrained("runs/trainer/final")


if __name__ == "__main__":
    main()
