"""Sequence log-probabilities and the two preference losses of SAPO, DPO and ORPO. Needs torch alone.

B is the number of sequences or pairs, T the padded length, V the vocabulary. Equation numbers are those of the SAPO
paper (arXiv 2405.20830). A log-probability is in nats; "logps" is one number a sequence, the sum over its tokens or,
with average=True, the mean. DPO takes sums, ORPO takes means:

    chosen_logps = sequence_logps(model(chosen).logits, chosen_labels)      # labels: -100 on prompt and padding
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses.mean().backward()
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logps(logits: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """Log-probability of each labelled sequence.

    logits: (B, T, V) as a causal model returns them; logits[:, t] scores labels[:, t + 1], so the shift is done here.
    labels: (B, T) token ids; -100 marks what is not scored (prompt, padding). labels[:, 0] is never scored.
    Returns (B,) in at least fp32: the sum over the labelled tokens, or their mean (0 where a row has none).
    Raises ValueError when the shapes do not match.

        labels [[-100, 7, 8, -100]]  ->  logits[0, 0] at 7  +  logits[0, 1] at 8
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not match in (B, T)")
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != -100
    logps = token_logps(logits.flatten(0, 1), labels.flatten()).view(labels.shape)      # 0 where not scored
    return logps.sum(-1) / scored.sum(-1).clamp(min=1) if average else logps.sum(-1)


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label: logits (N, V), labels (N,) -> (N,) in at least fp32; 0 where the label is -100."""
    return -F.cross_entropy(at_least_fp32(logits), labels, ignore_index=-100, reduction="none")


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float = 0.1, label_smoothing: float = 0.0):
    """DPO (Rafailov et al. 2023), Eq. 1: push the pair's log-ratio above the reference's.

    All arguments (B,), summed log-probabilities. beta: strength of the pull towards the reference.
    label_smoothing: assumed probability that a pair is the wrong way round (conservative DPO); 0 is Eq. 1.
    Returns (losses, chosen_rewards, rejected_rewards), (B,) each, in at least fp32; the rewards, beta * (policy -
    reference), are detached.

        every logp equal  ->  losses = log 2 = 0.6931, rewards = 0
    """
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps = (at_least_fp32(x) for x in (
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps))
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    ref_logratios = reference_chosen_logps - reference_rejected_logps
    logits = beta * (pi_logratios - ref_logratios)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def orpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_nll: Tensor, lam: float = 0.05):
    """ORPO (Hong et al. 2024), Eq. 2 and 3: supervised loss plus lam times the log odds ratio loss.

    policy_*_logps: (B,) per-token mean log-probabilities, <= 0. chosen_nll: (B,) the supervised term, the mean negative
    log-likelihood of the chosen response. lam: weight of the odds ratio term.
    Returns (losses, chosen_rewards, rejected_rewards), (B,) each, in at least fp32; the rewards, lam * logps, are
    detached. Losses and gradients are finite for every logp <= 0, 0 included.

        chosen = rejected  ->  log odds ratio 0, losses = chosen_nll + lam * 0.6931
    """
    chosen, rejected, chosen_nll = (at_least_fp32(x) for x in (policy_chosen_logps, policy_rejected_logps, chosen_nll))
    log_odds_ratio = log_odds(chosen) - log_odds(rejected)                              # inside Eq. 3
    losses = chosen_nll - lam * F.logsigmoid(log_odds_ratio)                            # Eq. 3
    return losses, lam * chosen.detach(), lam * rejected.detach()


def log_odds(logps: Tensor) -> Tensor:
    """Eq. 2 in logs: log(p / (1 - p)) from log p <= 0. expm1 keeps 1 - p exact where p is close to 1."""
    logps = logps.clamp(max=-1e-12)         # p = 1 has infinite odds: stop just before, with gradient 0 beyond
    return logps - torch.log(-torch.expm1(logps))


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 to fp32; fp32 and fp64 stay what they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
