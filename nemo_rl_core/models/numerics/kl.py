"""KL divergence between two policies, estimated at tokens that were sampled.

x = log(q / p) of a token sampled from p. Three estimators of KL(p || q) (J. Schulman, "Approximating KL divergence",
2020): k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x. Their values agree in expectation (k2 nearly), their gradients do
not: see the losses that differentiate them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["kl_estimate"]


def kl_estimate(log_ratio: Tensor, kind: str, *, bound: float | None = None) -> Tensor:
    """KL(p || q) at each token sampled from p, in nats.

    Args:
        log_ratio: [...] log q - log p of the sampled token.
        kind: "k1", "k2" or "k3".
        bound: Log-ratios beyond count as this (and have no gradient); None is no bound.

    Returns:
        [...], of which k2 and k3 are never below 0.

    Raises:
        ConfigError: `kind` is another.
    """
    x = log_ratio if bound is None else log_ratio.clamp(-bound, bound)
    if kind == "k1":
        return -x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return x.expm1() - x  # exp(x) - 1 would lose all digits near 0 and go negative
    raise ConfigError(f"KL estimator {kind!r} is not known; allowed: 'k1', 'k2', 'k3'")
