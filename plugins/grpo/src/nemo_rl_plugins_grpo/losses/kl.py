"""KL divergence to a reference policy, from samples: its value, and apart from it its gradient.

x = log(reference / policy) of a sampled token. Three estimators of KL(policy || reference)
(J. Schulman, "Approximating KL divergence", 2020): k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x.

An estimator that is right in value is not so in gradient once it is differentiated: k1 alone has zero
expected gradient, k3 alone that of the KL in the other direction. Multiplying by exp(logprob - detached
logprob), which is 1 and carries the score function, gives the gradient of the expectation.
"""

from __future__ import annotations

from torch import Tensor

from nemo_rl_core.errors import ConfigError

__all__ = ["kl_estimate", "reference_kl"]


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """Estimate KL(p || q) at tokens sampled from p.

    Args:
        log_ratio: [...] log q - log p of the sampled token.
        kind: "k1", "k2" or "k3".
    """
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio  # exp(x) - 1 would lose all digits near 0 and go negative
    raise ConfigError(f"KL estimator {kind!r} is not known; allowed: 'k1', 'k2', 'k3'")


def reference_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    kind: str,
    gradient: str,
    input_clamp: float,
    output_clamp: float,
) -> Tensor:
    """KL of each token to the reference policy, with the gradient asked for.

    Outside the clamps a token keeps its bounded value and has no gradient.

    Args:
        logprobs: [N] of the policy, with gradient.
        ref_logprobs: [N] of the reference.
        rollout_logprobs: [N] of the policy that sampled; read by `gradient="importance"` only.
        kind: See `kl_estimate`.
        gradient: "unbiased": of the expectation under the policy; "importance": the same, with weight
            policy / sampling policy; "direct": of the estimator as a function of `logprobs`.
        input_clamp: Bound on |log_ratio|.
        output_clamp: Bound on the magnitude of the result.

    Returns:
        [N] in nats.
    """
    log_ratio = ref_logprobs - logprobs
    value = kl_estimate(log_ratio.clamp(-input_clamp, input_clamp), kind)
    if gradient != "direct":
        sampled_by = logprobs.detach() if gradient == "unbiased" else rollout_logprobs
        weight = (logprobs - sampled_by).clamp(-input_clamp, input_clamp).exp()
        value = value * weight.where(log_ratio.detach().abs() <= input_clamp, weight.detach())
    return value.clamp(-output_clamp, output_clamp)
