"""Checkpoints: one format for every engine and world size, published all or nothing."""

from ddpm_dist.checkpoint.format import Piece, Reader, open_checkpoint
from ddpm_dist.checkpoint.ownership import Ownership
from ddpm_dist.checkpoint.retention import published, reaches
from ddpm_dist.checkpoint.store import CheckpointStore
from ddpm_dist.checkpoint.workplace import Workplace

__all__ = [
    "CheckpointStore",
    "Ownership",
    "Piece",
    "Reader",
    "Workplace",
    "open_checkpoint",
    "published",
    "reaches",
]
