"""Speeds of devices and links. Data only: the command line lists the names without torch.

Peaks are the makers' for dense bfloat16 (half of the figures "with sparsity"):

- A100 80GB SXM, H100 SXM, H200 SXM: NVIDIA's datasheets. NVLink has 600, 900 and 900 GB/s, both directions together.
- B200: NVIDIA's Blackwell architecture brief, HGX B200 at 1,000 W a GPU; memory as in DGX B200 (1,440 GB and 64 TB/s for 8).
  NVLink has 1.8 TB/s, both directions together. Others sell it with 192 GB.
- MI300X: AMD's datasheet; seven links of 64 GB/s in each direction.
- InfiniBand HDR, NDR and XDR: 200, 400 and 800 Gbit/s a port, as of ConnectX-6, 7 and 8
  (docs.nvidia.com/networking/display/connectx8supernic). A port for each GPU is assumed, as in DGX systems.

Shares of these figures that programs reach are assumptions:

- Products of the orthogonalization: half of the peak; 35% on MI300X, where 45% is reported for large products.
- Forward and backward pass: 40% of the peak. Llama 3 405B reached 38 to 43% on H100 (Dubey et al. 2024, arXiv 2407.21783,
  table 4).
- Memory: 80% of the bandwidth. Links: 70%.
- The host: 5 microseconds a launch. CUDA's own launch of a small kernel takes 3.8 of them (NVIDIA's blog "Getting Started with
  CUDA Graphs", 2019, on a V100), the rest stands for PyTorch's operator. Slower hosts take up to five times that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ds_optforge.errors import ConfigError

UTILISATION = 0.4
_MEMORY_SHARE = 0.8
_LINK_SHARE = 0.7
_RANKS_OF_A_NODE = 8
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of accelerator.

    Attributes:
        tflops: peak of dense bfloat16 products, TFLOP/s.
        products: share of it that products of the orthogonalization reach.
        memory_gb: memory, 10^9 bytes.
        memory_tbps: bandwidth of the memory, 10^12 bytes per second.
        fabric_gbps: Gbit/s of the links between the devices of a node (NVLink, Infinity Fabric), in each direction.
    """

    tflops: float
    products: float
    memory_gb: float
    memory_tbps: float
    fabric_gbps: float


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "a100": Device(312, 0.5, 80, 2.039, 2400),
        "h100": Device(989.4, 0.5, 80, 3.35, 3600),
        "h200": Device(989.4, 0.5, 141, 4.8, 3600),
        "b200": Device(2250, 0.5, 180, 8.0, 7200),
        "mi300x": Device(1307.4, 0.35, 192, 5.3, 3584),
    }
)
NVLINK = "nvlink"
# Gbit/s of a rank in each direction; None: the device's own links. Ethernet: 100 Gbit/s for a node, shared by its 8 ranks.
LINKS: Mapping[str, float | None] = MappingProxyType(
    {NVLINK: None, "ib200": 200.0, "ib400": 400.0, "ib800": 800.0, "ethernet": 12.5}
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The speed of a rank, as programs reach it.

    Attributes:
        tflops: TFLOP/s of the products of an orthogonalization.
        link_gbps: Gbit/s of its link, in each direction.
        model_tflops: TFLOP/s of the forward and backward pass, the whole iteration's where ZeRO's traffic is hidden.
        memory_tbps: 10^12 bytes per second of elementwise work.
        memory_gb: its memory, 10^9 bytes.
        title: names of device and link.

    Raises:
        ConfigError: a speed is not positive.
    """

    tflops: float
    link_gbps: float
    model_tflops: float = UTILISATION * 989.4
    memory_tbps: float = _MEMORY_SHARE * 3.35
    memory_gb: float = 80.0
    title: str = ""

    def __post_init__(self) -> None:
        """Check the speeds."""
        for name in ("tflops", "link_gbps", "model_tflops"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name.replace('_', ' ')}: got {value:g}; allowed: a positive number")


def hardware(
    device: str,
    link: str | None,
    world_size: int,
    utilisation: float = UTILISATION,
    tflops: float | None = None,
    link_gbps: float | None = None,
) -> Hardware:
    """Return the speed of a rank.

    Args:
        device: of `DEVICES`.
        link: of `LINKS`; every byte is taken to go over it. None: nvlink for up to 8 ranks, ib400 for more.
        world_size: number of ranks.
        utilisation: share of the peak that the forward and backward pass reach.
        tflops: TFLOP/s that products of the orthogonalization reach, in place of the device's.
        link_gbps: Gbit/s that the link reaches, in place of the link's.

    Raises:
        ConfigError: a speed is not positive, or the utilisation is no share.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation: got {utilisation:g}; allowed: a number above 0 and up to 1")
    found = DEVICES[device]
    link = link or (NVLINK if world_size <= _RANKS_OF_A_NODE else "ib400")
    nominal = LINKS[link] or found.fabric_gbps
    return Hardware(
        found.products * found.tflops if tflops is None else tflops,
        _LINK_SHARE * nominal if link_gbps is None else link_gbps,
        utilisation * found.tflops,
        _MEMORY_SHARE * found.memory_tbps,
        found.memory_gb,
        f"{device}, {link if link_gbps is None else f'{link_gbps:g} Gbit/s'}",
    )
