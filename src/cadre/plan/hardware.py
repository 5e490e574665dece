"""Devices to plan for: what each can do at its peak, by its vendor's figures, and what it costs by a stated assumption.

Rates are dense (the data sheets' figures "with sparsity" are twice as high) and a link's rate is one direction's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from cadre.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU.

    flops: FLOP/s by precision. memory_bytes, memory_bandwidth (bytes/s): the device's own memory. node_size: devices that
    share the fast links. link_bandwidth, network_bandwidth: bytes/s of one device to its node and beyond it, one direction.
    watts: power at full load. rent: US dollars a device-hour. efficiency: share of `flops` reached while computing, dense
    layers. half_rate_width: routed experts this wide compute at half of that, in general at w / (w + half_rate_width).
    sources: where each of these comes from. cpu: whether it is one.
    """

    name: str
    flops: dict[str, float]
    memory_bytes: float
    memory_bandwidth: float
    node_size: int
    link_bandwidth: float
    network_bandwidth: float
    watts: float
    rent: float
    efficiency: dict[str, float]
    half_rate_width: float
    sources: dict[str, str]
    cpu: bool = False


# What a GPU reaches while it computes: fitted so that the step model of `cadre.plan.step` gives published throughputs with
# the published layouts. docs/plan.md has the table, tests/plan/test_published.py holds it.
_GPU_EFFICIENCY = {"bf16": 0.56, "fp8": 0.352}
_GPU_HALF_RATE_WIDTH = 2500.0
_GPU_EFFICIENCY_SOURCE = (
    "fitted: bf16 to Llama 3 405B on H100 (arXiv 2407.21783, table 4), narrow experts to DeepSeek-V2's 172.8K H800-hours per "
    "trillion tokens (arXiv 2405.04434, section 3.2.3), fp8 to DeepSeek-V3's 2,664K (arXiv 2412.19437, table 1)"
)
# A float32 GEMM over 32 experts 128 wide reaches 84% of one dense GEMM on 2 cores, which this width gives.
_CPU_HALF_RATE_WIDTH = 24.0
_CPU_EFFICIENCY = {"fp32": 0.45, "bf16": 0.35}

# Bytes that arrive, of the bytes/s a link is sold with: 160 of 200 GB/s over NVLink, 40 of 50 GB/s over InfiniBand.
LINK_EFFICIENCY = 0.8
LINK_EFFICIENCY_SOURCE = "arXiv 2505.09343, section 4.3: 160 of 200 GB/s over NVLink, 40 of 50 GB/s over InfiniBand reached"


_GPUS_A_NODE = 8


def _gpu(
    name: str, bf16: float, fp8: float | None, memory: float, bandwidth: float, link: float, network: float, watts: float,
    rent: float, figures: str, links: str, rented: str,
) -> Device:  # fmt: skip
    """A GPU from data sheet units: TFLOP/s, GB, GB/s, W, USD/h."""
    flops = {"bf16": bf16 * 1e12} | ({} if fp8 is None else {"fp8": fp8 * 1e12})
    return Device(
        name, flops, memory * 1e9, bandwidth * 1e9, _GPUS_A_NODE, link * 1e9, network * 1e9, watts, rent,
        {precision: _GPU_EFFICIENCY[precision] for precision in flops}, _GPU_HALF_RATE_WIDTH,
        {"flops": figures, "memory": figures, "watts": figures, "links": links, "rent": rented,
         "efficiency": _GPU_EFFICIENCY_SOURCE},
    )  # fmt: skip


def _cpu(name: str, flops: dict[str, float], read: float, figures: str) -> Device:
    """Two cores of a server CPU, as clouds rent them. `read`: bytes/s."""
    return Device(
        name, flops, 24e9, read, 1, read, 1.25e9, 30, 0.08,
        {precision: _CPU_EFFICIENCY[precision] for precision in flops}, _CPU_HALF_RATE_WIDTH,
        {"flops": figures, "memory": f"assumption: 24 GB; {read / 1e9:.0f} GB/s of reading were measured beside the GEMM rate",
         "watts": "assumption: 15 W a core", "links": "assumption: 10 Gb/s Ethernet",
         "rent": "assumption: about what clouds ask for 2 virtual cores",
         "efficiency": "between cadre train's with pocket and with 20M parameters on 2 cores: 39% and 64% of the GEMM rate in "
                       "float32, 25% and 54% in bfloat16 (benchmarks/README.md)",
         "experts": "grouped GEMM on 2 cores: 84% of the dense rate for experts 128 wide"},
        cpu=True,
    )  # fmt: skip


_NVLINK = "NVIDIA: NVLink 900 GB/s both ways; one 400 Gb/s adapter a GPU as in DGX systems"
_ASSUMED = "assumption: in the range of 2025-26 on-demand prices"
_HOPPER = "NVIDIA Hopper data sheets, dense; tabulated at glennklockwood.com/garden/processors/h100"

_ALL = (
    _gpu("h100", 989.4, 1978.9, 80, 3350, 450, 50, 700, 2.0, _HOPPER, _NVLINK, _ASSUMED),
    _gpu("h800", 989.4, 1978.9, 80, 3350, 200, 50, 700, 2.0, f"{_HOPPER} (H800: the same chip)",
         "arXiv 2505.09343, section 4.3: NVLink 200 GB/s, one 400 Gb/s adapter a GPU",
         "arXiv 2412.19437, table 1: $2 a GPU hour, an assumption there too"),
    _gpu("h200", 989.4, 1978.9, 141, 4800, 450, 50, 700, 2.5,
         "NVIDIA H200 data sheet, dense; tabulated at itkb.uw.cz (NVIDIA H200 vs B300)", _NVLINK, _ASSUMED),
    _gpu("b200", 2250, 4500, 180, 8000, 900, 50, 1000, 4.0,
         "NVIDIA HGX B200 at 1,000 W, dense; tabulated at glennklockwood.com/garden/processors/B200; 180 GB: DGX B200",
         "NVIDIA: NVLink 5 1,800 GB/s both ways; one 400 Gb/s adapter a GPU as in DGX B200", _ASSUMED),
    _gpu("a100", 312, None, 80, 2039, 300, 25, 400, 1.3,
         "NVIDIA A100 80GB SXM data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), dense",
         "NVIDIA: NVLink 600 GB/s both ways; one 200 Gb/s adapter a GPU as in DGX A100", _ASSUMED),
    _gpu("mi300x", 1307.4, 2614.9, 192, 5300, 448, 50, 750, 1.85,
         "AMD Instinct MI300X data sheet: peak bf16 1,307.4 and fp8 2,614.9 TFLOP/s, 192 GB, 5.3 TB/s, 750 W",
         "AMD: 7 Infinity Fabric links, 896 GB/s both ways; one 400 Gb/s adapter a GPU is an assumption",
         "a listed on-demand price: gpu.blog/gpus/instinct-mi300x-mi300x"),
    _gpu("l40s", 362.05, 733, 48, 864, 32, 12.5, 350, 1.0,
         "NVIDIA L40S data sheet, dense; tabulated at mullet.se (L40/L40S)",
         "NVIDIA: PCIe Gen4 x16, 64 GB/s both ways; 100 Gb/s a GPU beyond the node is an assumption", _ASSUMED),
    _gpu("rtx4090", 165.2, 330.3, 24, 1008, 32, 12.5, 450, 0.4,
         "NVIDIA Ada: dense with float32 accumulation; tabulated at waredb.com/processor/nvidia-geforce-rtx-4090",
         "PCIe Gen4 x16, 64 GB/s both ways; 100 Gb/s a GPU beyond the node is an assumption", _ASSUMED),
    _cpu("cpu-2core", {"fp32": 340e9}, 29e9, "docs/log.md: GEMM rate of 2 cores of an Intel Xeon with AVX-512"),
    _cpu("cpu-2core-bf16", {"bf16": 880e9, "fp32": 380e9}, 45e9, "docs/log.md: GEMM rates of 2 cores of an AMD EPYC"),
)  # fmt: skip


def hardware_names() -> list[str]:
    """The names `hardware` knows."""
    return [device.name for device in _ALL]


def hardware(name: str) -> Device:
    """The device of this name, in any mix of cases. Raises `UsageError` with the nearest names for another."""
    wanted = name.lower()
    for device in _ALL:
        if device.name == wanted:
            return device
    close = difflib.get_close_matches(wanted, hardware_names(), n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(hardware_names())}"
    raise UsageError(f"--hardware {name}: not in the catalogue; {hint}")
