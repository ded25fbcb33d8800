"""Arithmetic of language models: logprobs and gradients of the output layer, attention, products, KL."""
