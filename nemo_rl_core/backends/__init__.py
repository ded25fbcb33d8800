"""Parts that training backends share; only backends and their kits import them."""
