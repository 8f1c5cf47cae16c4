"""What the makers of devices say of one: the figures of an estimate, measured by nobody here.

TPUs: cloud.google.com/tpu/docs/v5e, /v5p and /v6e for memory, its bandwidth and bfloat16 flops. Their links: "How to
Scale Your Model" (jax-ml.github.io/scaling-book), chapter "How to Think About TPUs": 45 GB/s a link and direction on
v5e, 90 on v5p and v6e; a ring along one axis of the torus brings a chip two of them.
H100: NVIDIA's data sheet of the SXM5 module, dense flops; NVLink 4 has 900 GB/s in both directions together.
"""

import dataclasses

GPUS_OF_A_NODE = 8


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one device: bytes, bytes a second, and flops a second of bfloat16 products with float32 sums."""

    platform: str
    memory: int
    bandwidth: float  # of its memory
    flops: float
    link: float  # what it can receive from its neighbours along one axis
    axes: int = 1  # of a slice's topology
    example: str = ""


FIGURES = {
    "v5e": Figures("tpu", 16 * 2**30, 819e9, 197e12, 90e9, 2, "v5e:16x16"),
    "v5p": Figures("tpu", 95 * 2**30, 2765e9, 459e12, 180e9, 3, "v5p:2x2x4"),
    "v6e": Figures("tpu", 32 * 2**30, 1640e9, 918e12, 180e9, 2, "v6e:4x4"),
    "h100": Figures("cuda", 80 * 2**30, 3350e9, 989e12, 450e9),
}
