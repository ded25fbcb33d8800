"""Ragged batches, packing, message logs and the data module."""
