"""One of the doctor's two ranks:  torchrun --nproc_per_node=2 -m ddpm_dist.doctor_ranks gloo. Rank 0 prints JSON."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

from ddpm_dist import rendezvous

FLOATS = 4_000_000  # 16 MB, about a bucket of DDP
ROUNDS = 5


def main() -> None:
    rendezvous.join()  # dies with torchrun
    import torch
    import torch.distributed as dist

    backend, rank = sys.argv[1], int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=100))

    def seconds(floats: int) -> float:
        """Of one all-reduce, the best of some; the sum has to be right."""
        times = []
        for _ in range(ROUNDS):
            numbers = torch.full((floats,), rank + 1.0, device=device)
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(numbers)
            total = float(numbers.sum())  # waits for the device
            times.append(time.perf_counter() - started)
            if total != 3.0 * floats:
                raise RuntimeError(f"error: the sum over two ranks is {total / floats}, not 3")
        return min(times)

    latency, large = seconds(1), seconds(FLOATS)
    if rank == 0:
        print(
            json.dumps({"backend": backend, "latency_ms": latency * 1e3, "mb_per_s": FLOATS * 4 / 1e6 / large}),
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
