"""Supervised fine-tuning for NeMo RL."""
