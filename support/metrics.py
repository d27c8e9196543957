"""What is logged of the losses of a step."""
import math

from torch import Tensor

from sapo import Pair, PairLogps


class LossMetrics:
    """Sums over a step's micro-batches.

    nonfinite_rows: rows of this process's pairs whose loss was not finite.
    """

    def __init__(self, s):
        """s: the run's settings."""
        self.s = s
        self.sums: dict[str, tuple[float, int]] = {}        # name -> sum, count
        self.nonfinite_rows: list[int] = []

    def add(self, pairs: list[Pair], losses: Tensor, policy: PairLogps, rewards) -> None:
        """losses: (pairs,). rewards: of the chosen and the rejected responses, (pairs,) each; None
        for SFT."""
        values = {"nll": policy.chosen_nll, "chosen_logps": policy.chosen_logps, "loss": losses}
        if rewards:
            chosen_rewards, rejected_rewards = rewards
            margin = chosen_rewards - rejected_rewards
            # The margin of an identical pair is 0 up to rounding: its sign would be noise.
            differ = [pair.chosen != pair.rejected for pair in pairs]
            values |= {"rejected_logps": policy.rejected_logps, "chosen_rewards": chosen_rewards,
                       "rejected_rewards": rejected_rewards, "margin": margin,
                       "reward_accuracy": (margin > 0).float()[differ]}
        if self.s.loss == "dpo":
            # Without A, nothing is scored of a chosen response that is a prefix of the rejected.
            scored = [pair.start < len(pair.chosen) or self.s.nll_on == "prompt" for pair in pairs]
            values["nll"] = policy.chosen_nll[scored]
        for name, of_pairs in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + float(of_pairs.detach().sum()), count + len(of_pairs)
        self.nonfinite_rows += [pair.example_id
                                for pair, loss in zip(pairs, losses.tolist(), strict=True)
                                if not math.isfinite(loss)]
