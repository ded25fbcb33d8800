"""The main job in small: warm start by SFT, then GRPO, on a laptop CPU and without a network."""
