"""The stages in their order, most important first, and what part of the time each may take."""

from accelerator_stages.supervise import Stage

LARGE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}  # of a GPU's memory, for jax alone
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # so that torch finds room


QUICK = 1 / 3  # of the stage's time, for one row where none has much to compile


def stage(
    name: str, title: str, module: str, share: float, *, patience: float = 1.0, with_torch: bool = False
) -> Stage:
    """`with_torch`: it takes room on the device too."""
    return Stage(name, title, f"accelerator_stages.{module}", share, patience, {}, SHARED if with_torch else LARGE)


def decode(name: str, whose: str, model: str) -> Stage:
    return stage(name, f"A decode step of {whose} shape", "decode", 3)._replace(options={"model": model})


STAGES = (
    stage("machine", "The machine", "machine", 2),
    stage("row-tiles", "One row's bits in tiles of rows", "row_tiles", 2, patience=QUICK),
    stage("captured", "Bits with loops captured in command buffers", "captured", 2),
    stage("kernels", "Every kernel's bits alone and in a batch", "kernel_bits", 3, patience=QUICK),
    stage("contract", "The contract", "contract", 4),
    decode("decode-0.6b", "Qwen3-0.6B's", "qwen3-0.6b-shape"),
    decode("decode-8b", "an 8B's", "qwen3-8b-shape"),
    stage("prefill", "Prefill", "prefill", 3),
    stage("beside-xla", "Kernels beside XLA's own and torch's", "beside_xla", 3, patience=QUICK, with_torch=True),
    stage("beside-transformers", "Workloads beside transformers", "beside_transformers", 3, with_torch=True),
    stage("trace", "A decode step of Qwen3-0.6B's shape by kernel", "trace", 2),
)
