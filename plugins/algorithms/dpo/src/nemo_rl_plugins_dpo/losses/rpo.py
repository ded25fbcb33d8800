"""RPO: DPO with the likelihood of the chosen answer beside it, so that it does not fall with the rejected one's.

Source: Pang et al., iterative reasoning preference optimisation, arXiv:2404.19733, eq. 1; the same term stands in
Llama 3's DPO. Departure: the DPO term is not divided by the length of the answers, only the likelihood is.
"""

from __future__ import annotations

from typing import ClassVar

from nemo_rl_plugins_dpo.config import RPOConfig
from nemo_rl_plugins_dpo.losses.sigmoid import DPOLoss

__all__ = ["RPOLoss"]


class RPOLoss(DPOLoss):
    """The loss `dpo` with `nll_weight` 1."""

    config_class: ClassVar[type] = RPOConfig
