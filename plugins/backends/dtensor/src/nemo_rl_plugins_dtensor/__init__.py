"""PyTorch-native training backend (one device, FSDP2 and tensor parallelism by DTensor) for NeMo RL."""
