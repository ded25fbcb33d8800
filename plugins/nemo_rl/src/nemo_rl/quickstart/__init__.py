"""Quickstart: warm start by SFT, then GRPO, on a laptop's CPU and without a network."""
