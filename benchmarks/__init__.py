"""Benchmarks: every one of them reports a ratio against a baseline that it measures in the same run."""
