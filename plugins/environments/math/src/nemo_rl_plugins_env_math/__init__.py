"""Math environment for NeMo RL, verified by math-verify in a killable process pool."""
