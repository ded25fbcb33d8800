"""Reward models for NeMo RL."""
