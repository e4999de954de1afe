"""Chips, networks and storages that `plan` knows, each with where its numbers come from. Knows nothing else.

Rates are of one direction and in bytes or operations a second; sizes in bytes. What a chip or a link reaches in
practice is no property of it: that is pipeline.plan.assumptions.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator. flops8, flops16: dense peak with FP8 (0: not by train.precision fp8) and 16-bit inputs and fp32
    sums; flops32: in IEEE float32."""

    name: str
    flops16: float
    flops32: float
    memory: float
    memory_bandwidth: float
    watts: float
    link: float  # to the others of its node
    per_node: int
    cores_per_node: int
    source: str
    flops8: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """Between nodes: what one node sends, and the time of the shortest message."""

    name: str
    node_bandwidth: float
    latency: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What one node reads and writes, and what all nodes together do (0: each has its own)."""

    name: str
    node_read: float
    node_write: float
    total: float
    source: str


_NVIDIA = "NVIDIA data sheet"

CHIPS = (
    Chip(name="v100", flops16=125e12, flops32=15.7e12, memory=34.1e9, memory_bandwidth=0.9e12, watts=300, link=150e9,
         per_node=8, cores_per_node=40, source=f"{_NVIDIA} V100 SXM2 32 GB; DGX-1"),
    Chip(name="a100-40", flops16=312e12, flops32=19.5e12, memory=42.4e9, memory_bandwidth=1.555e12, watts=400,
         link=300e9, per_node=8, cores_per_node=128, source=f"{_NVIDIA} A100 SXM 40 GB; DGX A100"),
    Chip(name="a100", flops16=312e12, flops32=19.5e12, memory=85.1e9, memory_bandwidth=2.039e12, watts=400, link=300e9,
         per_node=8, cores_per_node=128, source=f"{_NVIDIA} A100 SXM 80 GB; DGX A100"),
    Chip(name="h100", flops16=989e12, flops32=66.9e12, memory=85.0e9, memory_bandwidth=3.35e12, watts=700, link=450e9,
         per_node=8, cores_per_node=112, source=f"{_NVIDIA} H100 SXM; DGX H100", flops8=1979e12),
    Chip(name="h200", flops16=989e12, flops32=66.9e12, memory=150.0e9, memory_bandwidth=4.8e12, watts=700, link=450e9,
         per_node=8, cores_per_node=112, source=f"{_NVIDIA} H200 SXM; DGX H200", flops8=1979e12),
    Chip(name="b200", flops16=2250e12, flops32=80e12, memory=192e9, memory_bandwidth=8.0e12, watts=1000, link=900e9,
         per_node=8, cores_per_node=112, source=f"{_NVIDIA} DGX B200", flops8=4500e12),
    Chip(name="l40s", flops16=362e12, flops32=91.6e12, memory=48e9, memory_bandwidth=0.864e12, watts=350, link=32e9,
         per_node=8, cores_per_node=64, source=f"{_NVIDIA} L40S; PCIe 4.0 x16", flops8=733e12),
    Chip(name="rtx4090", flops16=165.2e12, flops32=82.6e12, memory=25.2e9, memory_bandwidth=1.008e12, watts=450,
         link=32e9, per_node=4, cores_per_node=32, source=f"{_NVIDIA} Ada whitepaper; PCIe 4.0 x16", flops8=330.3e12),
    Chip(name="rtx3090", flops16=71e12, flops32=35.6e12, memory=25.3e9, memory_bandwidth=0.936e12, watts=350,
         link=32e9, per_node=4, cores_per_node=32, source=f"{_NVIDIA} GA102 whitepaper; PCIe 4.0 x16"),
    Chip(name="mi300x", flops16=1307e12, flops32=163.4e12, memory=206e9, memory_bandwidth=5.3e12, watts=750, link=448e9,
         per_node=8, cores_per_node=128, source="AMD data sheet MI300X"),
)  # fmt: skip

NETWORKS = (
    Network(name="ndr-8", node_bandwidth=400e9, latency=5e-6, source="8 × 400 Gbit/s InfiniBand NDR (DGX H100)"),
    Network(name="hdr-8", node_bandwidth=200e9, latency=5e-6, source="8 × 200 Gbit/s InfiniBand HDR (DGX A100)"),
    Network(name="edr-4", node_bandwidth=50e9, latency=5e-6, source="4 × 100 Gbit/s InfiniBand EDR (DGX-1)"),
    Network(name="efa-4", node_bandwidth=50e9, latency=2e-5, source="4 × 100 Gbit/s EFA (AWS p4d)"),
    Network(name="eth-400", node_bandwidth=50e9, latency=1e-5, source="400 Gbit/s Ethernet, RoCE"),
    Network(name="eth-100", node_bandwidth=12.5e9, latency=2e-5, source="100 Gbit/s Ethernet"),
    Network(name="eth-25", node_bandwidth=3.125e9, latency=5e-5, source="25 Gbit/s Ethernet, TCP"),
    Network(name="eth-10", node_bandwidth=1.25e9, latency=5e-5, source="10 Gbit/s Ethernet, TCP"),
)

STORAGES = (
    Storage(name="nvme", node_read=6e9, node_write=3e9, total=0, source="one PCIe 4.0 NVMe drive a node, assumed"),
    Storage(name="parallel", node_read=2e9, node_write=2e9, total=100e9, source="Lustre or the like, assumed"),
    Storage(name="nfs", node_read=1e9, node_write=1e9, total=1e9, source="one 10 Gbit/s server for all, assumed"),
    Storage(name="s3", node_read=1.25e9, node_write=1.25e9, total=0, source="object store, 10 Gbit/s a node, assumed"),
)
