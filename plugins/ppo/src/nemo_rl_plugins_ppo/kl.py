"""KL divergence to the reference policy, estimated at tokens that were sampled.

x = log(reference / policy) of a sampled token. Estimators of KL(policy || reference) (J. Schulman, "Approximating KL
divergence", 2020): k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x.
"""

from __future__ import annotations

from torch import Tensor

from nemo_rl_core.errors import ConfigError

__all__ = ["kl_estimate"]

_MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str) -> Tensor:
    """KL(policy || reference) at each token, in nats.

    Args:
        logprobs: [N] of the policy.
        ref_logprobs: [N] of the reference.
        kind: "k1", "k2" or "k3". Log-ratios beyond 20 count as 20.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio  # exp(x) - 1 would lose all digits near 0 and go negative
    raise ConfigError(f"KL estimator {kind!r} is not known; allowed: 'k1', 'k2', 'k3'")
