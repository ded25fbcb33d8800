"""GRPO for NeMo RL: algorithm, clipped policy-gradient loss, group-relative advantages."""
