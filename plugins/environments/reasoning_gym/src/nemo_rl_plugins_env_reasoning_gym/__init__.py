"""All reasoning-gym tasks as NeMo RL environments and datasets, with a curriculum by config."""
