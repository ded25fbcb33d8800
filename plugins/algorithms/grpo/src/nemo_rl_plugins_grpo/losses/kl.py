"""KL divergence to a reference policy, from samples: its value, and apart from it its gradient.

x = log(reference / policy) of a sampled token; the estimators k1, k2 and k3 of the value are in
`nemo_rl_core.models.numerics.kl`.

An estimator that is right in value is not so in gradient once it is differentiated: k1 alone has zero
expected gradient, k3 alone that of the KL in the other direction. Multiplying by exp(logprob - detached
logprob), which is 1 and carries the score function, gives the gradient of the expectation.
"""

from __future__ import annotations

from torch import Tensor

from nemo_rl_core.models.numerics.kl import kl_estimate

__all__ = ["reference_kl"]


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
    value = kl_estimate(log_ratio, kind, bound=input_clamp)
    if gradient != "direct":
        sampled_by = logprobs.detach() if gradient == "unbiased" else rollout_logprobs
        weight = (logprobs - sampled_by).clamp(-input_clamp, input_clamp).exp()
        value = value * weight.where(log_ratio.detach().abs() <= input_clamp, weight.detach())
    return value.clamp(-output_clamp, output_clamp)
