"""PyTorch-native generation backend with continuous batching for NeMo RL."""
