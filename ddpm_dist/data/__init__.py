"""Data: sources, shards, order and the DALI pipeline."""
