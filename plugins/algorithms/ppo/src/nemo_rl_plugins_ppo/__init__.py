"""PPO for NeMo RL: a critic, generalised advantage estimation, clipped policy and value losses."""
