"""One file for each loss."""
