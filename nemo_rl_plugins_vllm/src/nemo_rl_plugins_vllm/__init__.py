"""Generation backend on vLLM for NeMo RL."""
