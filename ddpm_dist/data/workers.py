"""How many threads decode and read for a rank, and how far they work ahead: from the cores, the ranks and the memory of the machine."""

from __future__ import annotations

import os

from ddpm_dist.config import Data
from ddpm_dist.host_memory import free_host_memory

MOST_DECODERS, LEAST_READERS, MOST_READERS = 4, 4, 16
LEAST_AHEAD, MOST_AHEAD, IMAGES_AHEAD = 3, 8, 256
MEMORY_SHARE = 0.05  # of the free host memory, for all ranks of a machine, that waiting micro-batches may take


def local_ranks() -> int:
    """Ranks of this run on this machine, as torchrun, srun and DeepSpeed's launcher say."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cores_of_rank() -> int:
    """The cores of the machine shared by its ranks, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks())


def decode_threads(settings: Data | None = None) -> int:
    """DALI threads of this process: ``data.threads``, or its cores, four at the most."""
    return settings.threads if settings and settings.threads else min(MOST_DECODERS, cores_of_rank())


def readers(settings: Data) -> int:
    """Threads that read where storage is slow: ``data.readers``, or two for each core, 4 to 16. They wait more than they work."""
    return settings.readers or min(MOST_READERS, max(LEAST_READERS, 2 * cores_of_rank()))


def micro_batches_ahead(settings: Data, micro_batch: int) -> int:
    """Micro-batches that wait decoded: ``data.prefetch``, or 3 and for small ones up to 8, as long as memory is no question.

    A step on few images is short, and a pause of the loader's thread lasts several of them.
    """
    if settings.prefetch:
        return settings.prefetch
    ahead = min(MOST_AHEAD, max(LEAST_AHEAD, -(-IMAGES_AHEAD // micro_batch)))
    each = micro_batch * settings.channels * settings.image_size**2
    free = free_host_memory()
    fit = ahead if free is None else int(MEMORY_SHARE * free / local_ranks() / each)
    return max(1, min(ahead, fit))
