"""NeMo RL: post-training for language models, made of plugins. The facade and the default set."""
