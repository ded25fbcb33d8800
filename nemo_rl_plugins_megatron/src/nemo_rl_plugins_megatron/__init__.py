"""The `megatron` training backend of NeMo RL."""
