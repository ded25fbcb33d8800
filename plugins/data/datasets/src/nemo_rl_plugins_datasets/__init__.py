"""Dataset sources for NeMo RL: Hugging Face datasets, JSONL, CSV, Parquet."""
