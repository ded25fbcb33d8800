"""Direct preference optimisation for NeMo RL."""
