"""Ray clusters for NeMo RL: a launcher, generation engines in actors, weight sync through the object store."""
