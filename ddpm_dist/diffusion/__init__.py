"""Diffusion: schedules, objectives, guidance and samplers. Knows nothing of ranks, files or tracking."""

from ddpm_dist.diffusion.sampling import sample, to_uint8
from ddpm_dist.diffusion.schedule import Schedule

__all__ = ["Schedule", "sample", "to_uint8"]
