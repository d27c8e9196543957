"""examples/: programs that copy the modules. They run, print what their headers say, and are right.

lora.py's tests need peft, trainer.py's accelerate; they are skipped without.
"""
import ast
import copy
import importlib.util
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TORCHRUN
from safetensors.torch import load_file
from torch.nn.parallel.scatter_gather import scatter

from buffer import ReplayBuffer
from ema import EMA
from losses import orpo_loss
from sapo import Pair, PairScorer, make_pairs, pair_logps
from test_sapo import plain_logps, random_ids, some_pairs, tiny

EXAMPLES = REPOSITORY / "examples"
NEEDS = {"minimal": "transformers", "lora": "peft", "trainer": "accelerate"}
NUMBER = r"\d+\.\d+"


def example(name: str):
    """An example as a module; skips the test without the package that the example needs."""
    pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def some_examples(count: int = 6) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses that end with the end token 2."""
    rng = np.random.default_rng(0)
    return [(random_ids(rng, 5), [*random_ids(rng, 9), 2]) for _ in range(count)]


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# -------------------------------------------------------------------------------------- all of them

@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_the_modules_alone(path):
    """No example imports support/ or train.py, and each is named in examples/README.md."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module if isinstance(node, ast.ImportFrom) else name.name
                for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names}
    assert not {name for name in imported if name.split(".")[0] in ("support", "train")}
    assert f"]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def printed_in_header(name: str) -> list[str]:
    """The output that a program's docstring shows: the indented block after "prints"."""
    header = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    block = re.search(r" prints.*?:\n\n((?:    .*\n)+)", header + "\n")[1]
    return [line[4:] for line in block.splitlines()]


def losses_in(line: str) -> list[float]:
    return [float(x) for x in re.findall(rf"(?:loss|copies|adapters)\W+({NUMBER})", line)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_examples_print_what_their_headers_show(name, tmp_path):
    """Each example takes less than a minute of one core and prints the lines of its header.

    Losses are within 10%: those of later steps depend on the drawn tokens, which differ where
    rounding does. What a model wrote, norms and seconds may differ.
    """
    pytest.importorskip(NEEDS[name])
    for path in ("data", "losses.py", "buffer.py", "ema.py", "sapo.py"):
        (tmp_path / path).symlink_to(REPOSITORY / path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, text=True,
                          capture_output=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    shown, printed = printed_in_header(name), done.stdout.splitlines()
    assert len(shown) == len(printed), done.stdout
    for line, expected in zip(printed, shown, strict=True):
        if expected.endswith(", ...}"):                     # cut there in the header
            line, expected = line.split(",")[0], expected.split(",")[0]
        label = r"^(x|A|B C|B' C): "                        # the text after it was drawn
        found, wanted = re.match(label, line), re.match(label, expected)
        assert (found and found[0]) == (wanted and wanted[0])
        if not wanted:
            assert re.sub(NUMBER, "#", line) == re.sub(NUMBER, "#", expected)
            assert losses_in(line) == pytest.approx(losses_in(expected), rel=0.1)


# --------------------------------------------------------------------------------------- minimal.py

def test_minimal_is_short_and_on_the_readme():
    """minimal.py has at most 60 lines; up to the end of the loop the README shows it."""
    text = (EXAMPLES / "minimal.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    code = text.split("# where the modules are\n")[1].split("\npair = max")[0].strip()
    block, = re.findall(r"^```python\n(.*?)^```$",
                        (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert block.strip() == code


# ------------------------------------------------------------------------------------------ lora.py

def gradients_from_copy(policy, trained_copy) -> None:
    """Give the adapter the gradient that a full copy with the adapter merged in has (chain rule).

    W = base + s B A, so dA = s B^T dW and dB = s dW A^T.
    """
    modules = dict(trained_copy.named_modules())
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):
            gradient = modules[name.removeprefix("base_model.model.")].weight.grad
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.grad = module.scaling["default"] * b.detach().T @ gradient
            b.grad = module.scaling["default"] * gradient @ a.detach().T


def test_lora_equals_a_run_with_full_copies(monkeypatch):
    """Adapters on one base train as three full models would that hold the adapters merged.

    In the other run, the EMA model writes, the policy learns and the reference is a full copy
    each; the gradient reaches the adapter by the chain rule. The pairs of every step are the same,
    losses and final adapters are the same up to rounding.
    """
    lora = example("lora")
    examples, seen = some_examples(), []
    monkeypatch.setattr(lora, "pair_logps", lambda model, pairs, **options: (
        seen.append(pairs), pair_logps(model, pairs, **options))[1])
    monkeypatch.setattr(lora, "make_pairs", lambda *args, **options: make_pairs(
        *args, **options, temperature=0))
    torch.manual_seed(0)
    policy, ema_model, losses = lora.train(tiny(), examples, 2, steps=6, batch_size=4)

    torch.manual_seed(0)
    reference, other = tiny(), lora.with_adapter(tiny())
    ema = EMA(other, decay=0.5, update_every=2)     # a full copy, base and all
    buffer, rng = lora.ReplayBuffer(512), np.random.default_rng(0)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    for step, (loss, loss_of_copies) in enumerate(losses):
        minibatch = [examples[i] for i in rng.integers(len(examples), size=4)]
        for pair in make_pairs(lora.full_copy(ema.model), minibatch, 28, rng, eos_token_id=2,
                               temperature=0):
            buffer.add(pair)
        pairs = buffer.sample(4)
        assert pairs == seen[4 * step]
        trained = lora.full_copy(other).requires_grad_(True)
        expected = lora.mean_loss(pair_logps(trained, pairs), pair_logps(reference, pairs))
        assert (loss, loss_of_copies) == pytest.approx((expected.item(), expected.item()), rel=1e-4)
        optimizer.zero_grad()
        expected.backward()
        gradients_from_copy(other, trained)
        optimizer.step()
        ema.update(other)
    assert losses[0][0] == pytest.approx(np.log(2)) and losses[-1][0] < losses[0][0]
    for a, b in ((policy, other), (ema_model, ema.model)):
        gaps = (weights(a) - weights(b)).abs()
        assert gaps.mean() < 1e-6 and (gaps > 1e-5).float().mean() < 1e-3


def test_lora_moves_adapters_alone():
    """After training the base is as before, its memory is held once, and only adapters moved."""
    lora, base = example("lora"), tiny()
    before = weights(base)
    policy, ema_model, _ = lora.train(base, some_examples(), 2, steps=3, batch_size=4)
    ours = dict(ema_model.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (parameter.data_ptr() == ours[name].data_ptr()) == ("lora" not in name)
    with policy.disable_adapter(), torch.no_grad():
        for pair in some_pairs():
            assert torch.equal(torch.stack(plain_logps(policy, pair)),
                               torch.stack(plain_logps(tiny(), pair)))
    assert torch.equal(weights(policy.unload()), before)


def test_lora_memory_is_that_of_one_model():
    """Two adapters and a base take less than 1.2 models' memory, three full copies take three.

    What megabytes() counts is what the tensors of one model hold: 4 bytes per parameter.
    """
    lora = example("lora")
    config = lora.LlamaConfig(**{**lora.SMOLLM2_135M, "vocab_size": 512, "num_hidden_layers": 2})
    one = 4 * lora.LlamaForCausalLM(config).num_parameters() / 1e6
    shared, copies = lora.compare_memory(config)
    assert copies == pytest.approx(3 * one, rel=1e-3)
    assert one < shared < 1.2 * one


def test_a_reference_that_moves_is_a_third_adapter():
    """The header's lines: the reference holds the EMA model's adapter after every n-th step."""
    lora = example("lora")
    policy = lora.with_adapter(tiny())
    ema = EMA(policy, decay=0.5, update_every=1, trainable_only=True)
    reference = EMA(policy, decay=0, update_every=2, trainable_only=True)
    base = next(p.data_ptr() for n, p in policy.named_parameters() if "lora" not in n)
    assert base in {parameter.data_ptr() for parameter in reference.model.parameters()}
    for _ in range(2):
        before = weights(reference.model)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        ema.update(policy)
        moved = reference.update(ema.model)
        assert torch.equal(weights(reference.model), weights(ema.model) if moved else before)
    assert moved and not torch.equal(weights(reference.model), weights(policy))
    lora.mean_loss(pair_logps(policy, some_pairs()), pair_logps(reference.model, some_pairs()))


# --------------------------------------------------------------------------------------- trainer.py

def make_trainer(trainer, policy, folder: Path, accumulation: int = 1, **changes):
    """A SapoTrainer of a tiny policy: 4 steps of 4 examples. Notes its examples in .seen."""
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, learning_rate=1e-3, optim="adamw_torch",
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
        remove_unused_columns=False, disable_tqdm=True, use_cpu=True, **changes)
    sapo = trainer.Sapo(policy, 2, segment_len=4)
    seen, new_batch = [], sapo.new_batch
    sapo.new_batch = lambda examples: (seen.append(examples), new_batch(examples))[1]
    host = trainer.SapoTrainer(sapo, model=PairScorer(policy), args=args,
                               train_dataset=some_examples(16))
    host.seen = seen
    return host


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_equals_a_plain_loop(accumulation, tmp_path):
    """The Trainer's policy and EMA model are those of a plain loop over the same examples.

    So with two micro-batches per step too: the loss is their mean, and the EMA model moves once
    per optimizer step.
    """
    trainer, policy = example("trainer"), tiny()
    other = copy.deepcopy(policy)
    host = make_trainer(trainer, policy, tmp_path, accumulation)
    host.train()
    plain = trainer.Sapo(other, 2, segment_len=4)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0)
    assert len(host.seen) == 4 * accumulation
    for step in range(4):
        optimizer.zero_grad()
        for examples in host.seen[step * accumulation:(step + 1) * accumulation]:
            logps = pair_logps(other, plain.new_batch([tuple(x) for x in examples]), average=True)
            (orpo_loss(*logps)[0].mean() / accumulation).backward()
        optimizer.step()
        plain.ema.update(other)
    assert host.sapo.ema.steps == plain.ema.steps == 4
    assert not torch.allclose(weights(policy), weights(tiny()), atol=1e-4)
    for a, b in ((policy, other), (host.sapo.ema.model, plain.ema.model)):
        gaps = (weights(a) - weights(b)).abs()
        assert gaps.mean() < 1e-6 and (gaps > 1e-5).float().mean() < 1e-3


def test_the_trainer_fetches_ahead(tmp_path):
    """The trap: when the first step's pairs are made, the collator has seen two batches or more."""
    host = make_trainer(example("trainer"), tiny(), tmp_path)
    collated, ahead, collate = [], [], host.data_collator
    host.data_collator = lambda rows: (collated.append(rows), collate(rows))[1]
    new_batch = host.sapo.new_batch
    host.sapo.new_batch = lambda examples: (
        ahead.append(len(collated) - len(ahead) - 1), new_batch(examples))[1]
    host.train()
    assert ahead[0] >= 1


def test_dropout_stays_off_in_the_trainer(tmp_path):
    """The Trainer switches to training mode, compute_loss back: the scorer is called without it."""
    policy, modes = tiny(attention_dropout=0.5), []
    host = make_trainer(example("trainer"), policy, tmp_path)
    host.model.register_forward_pre_hook(lambda module, args: modes.append(policy.training))
    evaluate, host.model.train = [], (lambda original: lambda mode=True: (
        evaluate.append(mode), original(mode))[1])(host.model.train)
    host.train()
    assert modes == [False] * 4 and True in evaluate


@pytest.mark.parametrize("bf16", [False, True])
def test_the_ema_model_made_before_the_trainer_is_its_own(bf16, tmp_path):
    """The trap: what a host does to the policy's forward does not reach the EMA model.

    A forward replaced by a closure afterwards leaves the EMA model as it is; made after that, the
    EMA model would run the policy, and EMA refuses it.
    """
    trainer, policy = example("trainer"), tiny()
    host = make_trainer(trainer, policy, tmp_path, bf16=bf16)
    host.train()
    ema_model, ids = host.sapo.ema.model, torch.tensor([[5, 6, 7]])
    before = ema_model(ids).logits
    original = policy.forward
    policy.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with torch.no_grad():
        torch._foreach_mul_(list(policy.parameters()), 1.5)
    assert torch.equal(ema_model(ids).logits, before)
    assert not torch.allclose(policy(ids).logits, before, atol=1e-2)
    with pytest.raises(ValueError, match="replaced by a function"):
        trainer.Sapo(policy, 2)


def test_the_trainers_evaluation_is_of_no_use(tmp_path):
    """The trap: Trainer.evaluate calls the scorer with the batch itself, not with pairs."""
    host = make_trainer(example("trainer"), tiny(), tmp_path)
    with pytest.raises(TypeError, match="'pairs'"):
        host.evaluate(eval_dataset=some_examples(4))


def test_the_trainers_checkpoints_hold_the_scorer_alone(tmp_path):
    """The trap: neither the EMA model nor the buffer is in a checkpoint of the Trainer."""
    policy = tiny()
    host = make_trainer(example("trainer"), policy, tmp_path)
    host.args.save_strategy, host.args.save_steps = "steps", 4
    host.train()
    saved = load_file(tmp_path / "checkpoint-4/model.safetensors")
    assert saved and set(saved) <= {f"model.{name}" for name in policy.state_dict()}
    files = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert not [name for name in files if "ema" in name or "buffer" in name]
    restored = ReplayBuffer(512)
    restored.load_state_dict(host.sapo.buffer.state_dict(), item=Pair)
    assert restored.items == host.sapo.buffer.items and len(restored) == 16


def test_the_trainer_writes_no_checkpoint_of_tied_weights(tmp_path):
    """The trap: with tied weights the Trainer raises where it should write a checkpoint."""
    host = make_trainer(example("trainer"), tiny(tie_word_embeddings=True), tmp_path)
    host.args.save_strategy, host.args.save_steps = "steps", 4
    with pytest.raises(RuntimeError, match="share memory"):
        host.train()


def test_data_parallel_gives_every_device_all_pairs():
    """The trap: DataParallel does not split a list of pairs between devices."""
    pairs = [Pair([5], [6, 7], [6, 8], 1), Pair([9], [6], [7], 0)]
    assert [list(part) for part in scatter(pairs, [0, 1])] == [pairs, pairs]


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from transformers import TrainingArguments
sys.path[:0] = [EXAMPLES, ROOT, TESTS]
import trainer
from test_examples import make_trainer, weights
from test_sapo import tiny

class Unsynchronised(trainer.SapoTrainer):
    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(model.module, *args, **kwargs)

for kind in (trainer.SapoTrainer, Unsynchronised):
    trainer.SapoTrainer, policy = kind, tiny()
    host = make_trainer(trainer, policy, FOLDER, ddp_find_unused_parameters=False)
    assert host.args.world_size == 2
    host.train()
    everywhere = [torch.empty_like(weights(policy)) for _ in range(2)]
    dist.all_gather(everywhere, weights(policy))
    if host.args.process_index == 0:
        print("same" if torch.equal(*everywhere) else "different", flush=True)
"""


@pytest.mark.slow
def test_ddp_needs_the_scorer(tmp_path):
    """The trap: with the scorer that DDP wraps, both processes hold the same policy after training.

    With the scorer called past DDP, each process trains a policy of its own.
    """
    pytest.importorskip("accelerate")
    program = TWO_PROCESSES
    for name, value in {"EXAMPLES": EXAMPLES, "ROOT": REPOSITORY, "TESTS": REPOSITORY / "tests",
                        "FOLDER": tmp_path / "out"}.items():
        program = program.replace(name, repr(str(value)))
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([*TORCHRUN, str(tmp_path / "program.py")], capture_output=True, text=True,
                          timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line in ("same", "different")] == [
        "same", "different"]


@pytest.mark.slow
def test_the_trainer_example_under_torchrun(tmp_path):
    """torchrun with two processes runs the example and saves a policy that loads again."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    (tmp_path / "data").symlink_to(REPOSITORY / "data")
    done = subprocess.run([*TORCHRUN, str(EXAMPLES / "trainer.py")], cwd=tmp_path, text=True,
                          capture_output=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/trainer/final")
    start = AutoModelForCausalLM.from_pretrained(REPOSITORY / "data/model")
    assert not torch.allclose(weights(policy), weights(start), atol=1e-4)
    pair = Pair([5, 6], [7, 8], [9, 8], 0)
    assert torch.isfinite(torch.stack(pair_logps(policy, [pair]))).all()
