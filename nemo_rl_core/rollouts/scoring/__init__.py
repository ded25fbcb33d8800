"""Scoring of responses: a reward function as an environment, and the processes that compute it."""
