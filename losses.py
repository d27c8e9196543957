"""Sequence log-probabilities and the two preference losses of SAPO: DPO and ORPO.

Shapes: T is the padded length, V the vocabulary, N a number of tokens; (sequences,) and (pairs,)
name the batch. A log-probability is in nats. "logps" holds one number per sequence: the sum over
its tokens or, with average=True, their mean. DPO takes sums, ORPO takes means. Equations: arXiv
2405.20830.

    # padding on the right; labels: the ids, with -100 on prompt and padding
    chosen_logps = sequence_logps(model(ids).logits, labels)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps)
    losses.mean().backward()

Needs torch >= 2.9. MIT licence; from the reference code for SAPO (arXiv 2405.20830).
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label: logits (N, V), labels (N,) -> (N,) in at least fp32.

    0 where the label is -100.
    """
    return -F.cross_entropy(at_least_fp32(logits), labels, ignore_index=-100, reduction="none")


def sequence_logps(logits: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """Log-probability of each labelled sequence.

    logits: (sequences, T, V) as a causal model returns them. labels: (sequences, T) token ids; -100
    marks what is not scored (prompt, padding). Give both unshifted: the shift is done here,
    logits[:, t] scores labels[:, t + 1], so labels[:, 0] is never scored. Returns (sequences,) in
    at least fp32: the sum over the labelled tokens, or their mean (0 where a row has none). Raises
    ValueError when the shapes do not match.

        labels [[-100, 7, 8, -100]]  ->  log_softmax(logits[0, 0])[7] + log_softmax(logits[0, 1])[8]
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} "
                         "do not match in (sequences, T)")
    logits, targets = logits[:, :-1], labels[:, 1:]
    logps = token_logps(logits.flatten(0, 1), targets.flatten())
    logps = logps.view(targets.shape)                                   # (sequences, T - 1)
    count = (targets != -100).sum(-1).clamp(min=1)
    return logps.sum(-1) / count if average else logps.sum(-1)


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """DPO (Rafailov et al. 2023; Eq. 1): prefer the chosen response more than the reference does.

    The arguments are summed log-probabilities, (pairs,) each. beta: strength of the pull towards
    the reference. label_smoothing: assumed probability that chosen and rejected are swapped
    (conservative DPO); 0 is Eq. 1. Returns (losses, chosen_rewards, rejected_rewards), (pairs,)
    each, in at least fp32. The rewards, beta * (policy - reference), are detached. Raises
    ValueError when the shapes differ.

        every logp equal  ->  losses = log 2 = 0.6931, rewards = 0
    """
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = same_shape(
        policy_chosen_logps, policy_rejected_logps,
        reference_chosen_logps, reference_rejected_logps)
    policy_logratios = policy_chosen - policy_rejected
    reference_logratios = reference_chosen - reference_rejected
    margins = beta * (policy_logratios - reference_logratios)
    losses = (-F.logsigmoid(margins) * (1 - label_smoothing)
              - F.logsigmoid(-margins) * label_smoothing)
    chosen_rewards = beta * (policy_chosen - reference_chosen).detach()
    rejected_rewards = beta * (policy_rejected - reference_rejected).detach()
    return losses, chosen_rewards, rejected_rewards


def orpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_nll: Tensor,
              lam: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """ORPO (Hong et al. 2024; Eq. 3): the supervised loss plus lam times the odds ratio loss.

    losses = chosen_nll - lam * log sigmoid(log_odds(chosen) - log_odds(rejected))

    policy_*_logps: (pairs,) mean log-probabilities per token, <= 0. chosen_nll: (pairs,) the
    supervised term, the mean negative log-likelihood of y+ (the authors' code counts x, too). lam:
    weight of the odds ratio term.
    Returns (losses, chosen_rewards, rejected_rewards), (pairs,) each, in at least fp32. The rewards
    are for logging: lam * logps, detached. Losses and gradients are finite for every finite logp,
    0 included. Raises ValueError when the shapes differ.

        chosen = rejected  ->  log odds ratio 0, losses = chosen_nll + lam * 0.6931
    """
    chosen, rejected, nll = same_shape(policy_chosen_logps, policy_rejected_logps, chosen_nll)
    log_odds_ratio = log_odds(chosen) - log_odds(rejected)
    losses = nll - lam * F.logsigmoid(log_odds_ratio)
    return losses, lam * chosen.detach(), lam * rejected.detach()


def log_odds(logps: Tensor) -> Tensor:
    """Eq. 2 in logs: log(p / (1 - p)) from log p <= 0. expm1 keeps 1 - p exact for p near 1."""
    logps = logps.clamp(max=-1e-12)     # p = 1 has infinite odds: stop at e^27.6, with gradient 0
    return logps - torch.log(-torch.expm1(logps))


def same_shape(*tensors: Tensor) -> list[Tensor]:
    """The tensors in at least fp32. (n,) and (n, 1) would broadcast to (n, n) unseen."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"all arguments must have the same shape (pairs,), not {shapes}")
    return [at_least_fp32(tensor) for tensor in tensors]


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay what they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
