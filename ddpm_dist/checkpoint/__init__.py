"""Checkpoints: one format for every engine and world size, published all or nothing."""

from ddpm_dist.checkpoint.format import Piece, Reader, open_checkpoint
from ddpm_dist.checkpoint.lock import RunLock
from ddpm_dist.checkpoint.store import CheckpointStore, published, reaches

__all__ = ["CheckpointStore", "Piece", "Reader", "RunLock", "open_checkpoint", "published", "reaches"]
