"""Distillation for NeMo RL: a student learns the distribution of its teachers."""
