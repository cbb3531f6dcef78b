"""What the predictions assume: hardware, network, file system, failures and the model that is trained. Every number with its source."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.scaling_model import Link

DAY = 86_400.0

# Share of a link's nominal rate that a collective reaches. ASSUMPTION for networks, below what is reported for them: 46 to 48 of 50 GB/s
# per 400 Gb/s adapter (NVIDIA/nccl-tests#290), 85 of 100 GB/s for four 200 Gb/s adapters (NVIDIA/nccl-tests#119).
NETWORK_SHARE = 0.8
# Share of the memory's nominal rate that optimizer and averages reach. ASSUMPTION.
MEMORY_SHARE = 0.8
# Seconds that one message costs inside a node and between nodes: NCCL's own tuning tables (src/graph/tuning.cc, ring, protocol Simple:
# 3.4 microseconds over NVLink, 9.6 over the network).
NVLINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 9.6e-6


@dataclass(frozen=True)
class Hardware:
    """A kind of node with 8 GPUs. ``flops``: dense bf16 per GPU; ``mfu``: the share of it that training reaches (ASSUMPTION)."""

    name: str
    flops: float
    mfu: float
    memory_bandwidth: float
    inside: Link
    between: Link  # of one GPU: the node's adapters divided by its GPUs
    per_node: int = 8
    fixed: float = 0.0  # seconds of a step that do not depend on the batch: ASSUMPTION 0 where nothing was measured

    def compute(self, images: float, flop_per_image: float) -> float:
        """Seconds for forward and backward of ``images``."""
        return self.fixed + images * flop_per_image / (self.flops * self.mfu)


def _network(gigabits_per_gpu: float, latency: float = NETWORK_LATENCY) -> Link:
    return Link(NETWORK_SHARE * gigabits_per_gpu * 1e9 / 8, latency)


_H100 = Hardware(
    "H100, NVLink, 8 x 400 Gb/s InfiniBand",
    flops=989e12,  # data sheet of the H100 SXM: 1,979 TFLOP/s bf16 with sparsity, half of it dense; as ddpm_dist/flops.py
    # The highest share published for a convolutional UNet: MLPerf Training 4.0, Stable Diffusion v2 on 8 H200, 129 images/s per GPU.
    # That is another network at another size; what ours reaches on these GPUs has not been measured.
    mfu=0.33,
    memory_bandwidth=MEMORY_SHARE * 3.35e12,  # data sheet: HBM3, 3.35 TB/s
    # Data sheet: NVLink 900 GB/s, both directions together. NCCL counts 20.6 GB/s for each of its 18 links (src/graph/topo.h).
    inside=Link(18 * 20.6e9, NVLINK_LATENCY),
    between=_network(400),  # DGX H100: one 400 Gb/s ConnectX-7 for each GPU
)
PROFILES: dict[str, Hardware] = {
    "h100": _H100,
    # Data sheet of the H200: the H100's arithmetic and NVLink with 4.8 TB/s of HBM3e.
    "h200": replace(_H100, name="H200, NVLink, 8 x 400 Gb/s InfiniBand", memory_bandwidth=MEMORY_SHARE * 4.8e12),
    "a100": Hardware(
        "A100, NVLink, 8 x 200 Gb/s InfiniBand",
        flops=312e12,  # data sheet of the A100 SXM, dense bf16
        mfu=0.29,  # published: mosaicml/diffusion, Stable Diffusion 2 UNet at 512 px, 36 images/s per A100; another network
        memory_bandwidth=MEMORY_SHARE * 2.039e12,  # data sheet of the 80 GB version
        # Data sheet: NVLink 600 GB/s, both directions together; NCCL's tuning lets no A100 ring go beyond 235 GB/s.
        inside=Link(235e9, NVLINK_LATENCY),
        between=_network(200),  # DGX A100: one 200 Gb/s ConnectX-6 for each GPU
    ),
    # A node of H100s with one ordinary 100 Gb/s adapter for its 8 GPUs. Latency through TCP sockets: ASSUMPTION.
    "h100_ethernet": replace(_H100, name="H100, NVLink, 1 x 100 Gb/s Ethernet", between=_network(100 / 8, 50e-6)),
}


@dataclass(frozen=True)
class Site:
    """File system, processors, stragglers and failures; all ASSUMPTIONS but ``node_mtbf``, to be replaced by those of one's own cluster."""

    variation: float = 0.02  # of one GPU's step: standard deviation to mean (clocks, the host, other traffic)
    file_system: float = 20e9  # bytes/s that all nodes together write
    per_node: float = 2e9  # bytes/s that one node writes
    opens_per_second: float = 50_000.0  # files that all nodes together can open for reading
    cores_per_loader: int = 4  # what the loader of one rank gets; it uses no more threads for decoding
    files_per_second: float = 2_000.0  # files that all ranks together create, flush and rename
    copy_to_host: float = 5e9  # bytes/s of one rank's copy from its GPU: half of what PCIe 4 gives is already 13e9
    save_overhead: float = 0.2  # seconds that a save costs training besides the copy
    # SLURM holds a requeued job for two minutes by default; the rest is starting thousands of Python processes and compiling.
    restart: float = 120.0 + 180.0
    # Seconds between failures of one node that end the job. Llama 3, arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions
    # in 54 days on 16,384 GPUs (2,048 nodes).
    node_mtbf: float = 54 * DAY * 2048 / 419


@dataclass(frozen=True)
class Workload:
    """What is trained. Defaults: the flagship, whose parameters and arithmetic the program counts itself."""

    name: str = "flagship, 64x64"
    parameters: int = 23_335_299
    flop_per_image: float = 56.19e9  # forward and backward, ddpm_dist.flops.training_flops
    averages: int = 2
    bytes_per_image: float = 3_000.0  # a 64x64 JPEG: ASSUMPTION, some 6 bits per pixel
    bucket: float = 25 * 2**20  # DDP's default
    overlap: float = (
        0.5  # share of the compute that hides communication: ASSUMPTION; the backward pass is two thirds of it
    )
