"""Which code computes the decoder's ops: chosen once, by name, when an engine is made or sequences are scored.

"xla" is plain XLA (ops/xla.py), "cpu" kernels in C++ for x86-64 (ops/cpu_chain.py), "pallas_tpu" and "pallas_gpu" are
the devices' kernels (ops/chain.py), "pallas_interpret" runs the TPU's on any machine, slowly. Each has its own bits,
so the name is part of the contract; the layout of the KV cache belongs to it too.

An implementation is three small classes, one for each protocol below. On a mesh (`sharded`) each device runs its own
chain of them on the leaves that are its own; only a sum over leaves that is finished, a row of the embedding and the
logits travel.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig, check_kernels
from jaxengine.ops import cpu_chain, pallas, xla
from jaxengine.ops.chain import ChainAttention, ChainProducts
from jaxengine.ops.experts import Experts, Routing
from jaxengine.ops.heads import PackedHeads
from jaxengine.ops.in_tiles import ProductsInTiles
from jaxengine.ops.live import Live
from jaxengine.ops.pools import PAGES, PLAIN_MEMORY, Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.tiles import CPU_HEAD_TILE, GPU_TILES, HEAD_TILE, TPU_TILES, WIDE_HEAD_TILE, OwnTiles
from pallas_kernels import implementations
from pallas_kernels.draw_reference import Draw
from pallas_kernels.implementations import OF_A_GPU, Implementation
from pallas_kernels.wanted import Wanted
from sharding.leaves import ALL_HERE, Leaves
from sharding.mesh import Split, own_replica, processes_of, with_all_axes

OF_PLATFORM = {"cpu": "cpu", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}  # what "auto" is
Stream = Any  # the residual stream `[R, D]` float32 as an implementation passes it on: sums may be left to add
log = logging.getLogger("jaxengine")


class Products(Protocol):
    """Products of rows with weights, and what stands before and after them. A row's bits depend on it and the weights
    alone.

    Weights carry the leaf axis first (sharding/leaves.py), and columns of rows lie in the order of leaves; sums are
    float32, and added over leaves in the fixed order of the tree. All are differentiable in rows and weights.
    """

    @property
    def leaves(self) -> Leaves:
        """Who has the leaves."""
        ...

    def with_leaves(self, leaves: Leaves) -> "Products":
        """The same, inside a mesh's `on_each`, on each device's own leaves."""
        ...

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON."""
        ...

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " R"], live: Live) -> Stream:
        """The residual stream's beginning: rows of the embedding in float32."""
        ...

    def project(
        self,
        x: Stream,
        norm: Float[Array, " D"],
        eps: float,
        w: Float[Array, "leaf N D"],
        bias: Float[Array, "leaf N"] | None,
        live: Live,
    ) -> tuple[Stream, Any]:
        """(the residual stream, rms_norm(x) @ w.T + bias for every leaf's outputs, for `rotate_and_write`).

        vLLM: column parallel. What is normalised is rounded to the weights' dtype.
        """
        ...

    def gated(
        self, x: Stream, norm: Float[Array, " D"], eps: float, w: Float[Array, "leaf F2 D"], live: Live
    ) -> tuple[Stream, Float[Array, "R leaf*F"]]:
        """(the residual stream, silu(gate) · up of rms_norm(x)). A leaf's weights are its gates, then its ups."""
        ...

    def add(
        self,
        x: Stream,
        y: Float[Array, "R leaf*K"],
        w: Float[Array, "leaf D K"],
        bias: Float[Array, " D"] | None,
        live: Live,
    ) -> Stream:
        """The residual stream with y @ w.T + bias added, summed over leaves (vLLM: row parallel)."""
        ...

    def add_experts(
        self, x: Stream, norm: Float[Array, " D"], eps: float, experts: Experts, routing: Routing, live: Live
    ) -> Stream:
        """The residual stream with what the experts of each row make of rms_norm(x) added (ops/experts.py)."""
        ...

    def stream(self, x: Float[Array, "R D"]) -> Stream:
        """The residual stream in the form in which it passes from op to op."""
        ...

    def finish(self, x: Stream) -> Float[Array, "R D"]:
        """The residual stream as one array."""
        ...

    def logits(
        self,
        x: Float[Array, "t D"],
        norm: Float[Array, " D"],
        eps: float,
        head: Float[Array, "leaf V D"],
        fresh: Bool[Array, " t"] | None = None,
    ) -> Float[Array, "t V"]:
        """rms_norm(x) @ head.T in float32, whatever the weights' dtype; what is normalised is not rounded.

        Of one tile of rows, inside a caller's region. A row that is not `fresh` is the one before once more, or
        padding: it may get the logits of the last fresh row before it, which row 0 always is.
        """
        ...


class Attention(Protocol):
    """Pages of keys and values, and attention over them.

    A pool is one layer's keys, or its values: all pages `[P, …]`.
    """

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON."""
        ...

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        """Shapes and dtypes of one layer's keys and values."""
        ...

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Pools, or pages of them, as `[P, p, K, _]`; jax's or numpy's."""
        ...

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Array:
        """A step's block tables as `write` and `attend` take them."""
        ...

    def rows_of(self, packed: Any) -> Float[Array, "R N"]:
        """A projection as one array, differentiable."""
        ...

    def rotate_and_write(
        self,
        model_config: ModelConfig,
        packed: PackedHeads,
        pools: Pools,
        tables: Array,
        blocks: QueryBlocks,
        tile: int,
    ) -> tuple[Float[Array, "B r H h"], Pools]:
        """(queries, and the pools with each block's keys and values in the page that its table names).

        Queries and keys are normalised where the model has such norms, and rotated. A block lies in one page: block
        starts are multiples of r and page sizes too. `tile` is as in Live.
        """
        ...

    def attend(
        self, model_config: ModelConfig, pools: Pools, q: Float[Array, "B r H h"], tables: Array, blocks: QueryBlocks
    ) -> Float[Array, "B*r Hh"]:
        """Causal attention of the blocks over their sequences' pages, in the model's dtype.

        A block's bits do not depend on what else is attended; rows of blocks that are only padding may hold anything.
        Its gradient is the caller's affair (device/trunk.py).
        """
        ...


class DrawKernel(Protocol):
    """The end of a step: a token of each row, and its logprob."""

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        """A token of each row and its logprob under softmax(logits): where given ≥ 0 that token, else one that is
        drawn.

        Without uniforms all are given. Draw holds tokens (int32), logprobs, and per row the largest logit and the
        logarithm of the sum of exponentials after it is subtracted (float32, all `[t]`): `Draw.all_logprobs(logits)` is
        `[t, V]`.
        """
        ...

    def kept(
        self, logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
    ) -> Bool[Array, "t V"]:
        """What top-k, then top-p, then min-p keep of each row (pallas_kernels/truncation_reference.py).

        A row's answer depends on that row alone. It has no gradient.
        """
        ...


class HeadAndDraw(Protocol):
    """The head, and the draw of rows that ask for no more than cuts, as one op for one tile of rows."""

    def __call__(
        self,
        x: Float[Array, "t D"],
        norm: Float[Array, " D"],
        eps: float,
        head: Float[Array, "leaf V D"],
        wanted: Wanted,
        vocab_size: int,
    ) -> tuple[Int[Array, " t"], Float[Array, " t"], Bool[Array, " t"]]:
        """(tokens, logprobs, whether a row's logits and its logprob are finite), with the bits of `logits`, `kept` and
        `draw_and_score` one after the other. Rows that are not live may hold anything.
        """
        ...


class Memory(Protocol):
    """Where arrays lie that steps read as a whole. No bit depends on it."""

    def zeros(self, shape: jax.ShapeDtypeStruct) -> Array:
        """Those of a cache, where the shape's sharding says, or on the default device."""
        ...

    def settle(self, weights: Any) -> None:
        """What is done once to the memory of weights that every step will read."""
        ...


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The decoder's ops. Hashable, so that a jitted step can hold it as a static argument."""

    name: str  # as in EngineConfig.kernels, never "auto"
    products: Products
    attention: Attention
    draw: DrawKernel
    head_and_draw: HeadAndDraw | None = None  # where one device has all leaves
    own_tiles: OwnTiles = OwnTiles()
    head_tile: int = HEAD_TILE  # rows of a prefill step that the head and the draw take together
    skips_repeated: bool = False  # the head computes `fresh` rows alone, so it wants to be told which those are
    packs_rows: bool = False  # attention takes blocks of different numbers of rows (ops/query_blocks.py)
    computes_padding: bool = False  # all rows of a step's arrays, so that these had better be as small as its tile
    in_one: bool = False  # a row's bits depend on it alone without any tiles, so that a step needs no loop
    any_processor: bool = False  # tokens and logprobs are the same on all processors that it runs on
    memory: Memory = PLAIN_MEMORY
    skips: bool = True  # a step branches over what no row of a tile asks for; a GPU had better not
    split: Split | None = None  # the devices that share the weights; None inside `on_each`, and where there is one

    def on_each(self, function: Callable, *inputs: Any, outputs: Any) -> Callable:
        """`function(kernels, *arrays)` as a function of arrays, on each device's own parts (sharding/mesh.py).

        `inputs` and `outputs` are the arrays' PartitionSpecs, or trees of them. Where one device has all, the function
        runs as it is.
        """
        inside = functools.partial(function, dataclasses.replace(self, split=None))
        return inside if self.split is None else self.split.on_each(inside, inputs, outputs)

    def with_leaves(self, leaves: Leaves) -> "Kernels":
        """The same, with these in the place of those that the products have."""
        in_one_op = self.head_and_draw if leaves == ALL_HERE else None
        return dataclasses.replace(self, products=self.products.with_leaves(leaves), head_and_draw=in_one_op)

    def on_each_replica(self, function: Callable, *inputs: Any, outputs: Any) -> Callable:
        """As `on_each`, of a function that calls `on_each` itself, and differentiates only what is inside it: each
        device runs the whole of it, as if its replica were alone, on what the replica is given.
        """
        assert self.split is not None
        entered = dataclasses.replace(self.split, is_entered=True)
        inside = functools.partial(function, dataclasses.replace(self, split=entered))
        return self.split.on_each(inside, inputs, outputs)

    @property
    def replicas(self) -> int:
        """That can share rows (device/row_shares.py); 1 inside `on_each_replica`."""
        return 1 if self.split is None or self.split.is_entered else self.split.replicas

    def share(self, model_config: ModelConfig) -> ModelConfig:
        """What one device has of the model: its leaves' heads and inner values."""
        return model_config if self.split is None else model_config.share(self.split.degree)

    @property
    def whole(self) -> NamedSharding | None:
        """Where an array lies that every device of the mesh has; None where there is no mesh."""
        return None if self.split is None else self.split.sharding()

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        """Shapes and dtypes of one layer's keys and values, and where they lie on a mesh."""
        shapes = self.attention.pools(model_config, num_pages, page_size)
        if self.split is None:
            return shapes
        home = self.split.sharding(PAGES)
        keys, values = (shape.update(sharding=home) for shape in shapes)
        return keys, values

    def over_rows(self, body: Callable, tile: int, weights: Any, rows: Any, count: Int[Array, ""]) -> Any:
        """ops/regions.over_tiles, or the body alone where all rows are one tile of kernels that need no loop."""
        if self.in_one and jax.tree.leaves(rows)[0].shape[0] <= tile:
            return body(weights, rows)
        return over_tiles(body, tile, weights, rows, count)

    def when(self, wanted: Bool[Array, ""], do: Callable[[], Any], leave: Callable[[], Any]) -> Any:
        """`do()` where it is wanted, else `leave()`; always `do()` where a step has no conditionals."""
        return jax.lax.cond(wanted, do, leave) if self.skips else do()

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON: the contract holds it."""
        return {"name": self.name} | self.products.parts() | self.attention.parts()


XLA = Kernels("xla", ProductsInTiles(xla.XlaProducts()), xla.XlaAttention(), xla.XlaDraw())


def checked_for(model_config: ModelConfig, own: Kernels, mesh: Mesh) -> Mesh:
    """One replica's mesh, this process's first. Raises ValueError where its devices cannot share the model's leaves."""
    mesh, leaves = own_replica(with_all_axes(mesh)), model_config.reduction_leaves
    if mesh.shape["expert"] != 1:
        raise ValueError(
            f"the mesh's 'expert' has {mesh.shape['expert']} devices: devices share every expert, along 'tensor'"
        )
    degree = mesh.shape["tensor"]
    if leaves % degree:
        raise ValueError(
            f"{degree} devices cannot share reduction_leaves={leaves} leaves evenly: give reduction_leaves a multiple "
            "of them (it is in the bits)"
        )
    by_xla = own.name in ("xla", "cpu") and not own.any_processor
    if by_xla and degree == leaves > 1 and model_config.dtype != "float32":
        others = "give dtype='float32'" if model_config.num_experts else "take kernels 'cpu' or a device's own"
        raise ValueError(
            f"kernels {own.name!r} have other bits for one leaf of {model_config.dtype} than for several: with "
            f"reduction_leaves={leaves} at most {leaves // 2} devices can share them; {others}"
        )
    return mesh


def sharded(own: Kernels, mesh: Mesh) -> Kernels:
    """The kernels `own` on every device of a mesh, with the bits of one device that has all leaves."""
    split = Split(mesh)
    return dataclasses.replace(own.with_leaves(split.leaves), split=split)


def cpu_kernels(body: str = "best", *, has_experts: bool = False) -> Kernels:
    """The CPU's own kernels; `body` is one of pallas_kernels.cpu.library.BODIES. Experts are XLA's."""
    products, attention, draw = cpu_chain.CpuProducts(body), cpu_chain.CpuAttention(body), cpu_chain.CpuDraw(body)
    in_one_op = cpu_chain.CpuHeadAndDraw(body)
    how: Any = dict(head_tile=CPU_HEAD_TILE, skips_repeated=True, packs_rows=True, in_one=True, memory=cpu_chain.MEMORY)
    return Kernels("cpu", products, attention, draw, in_one_op, any_processor=not has_experts, **how)


def kernels_of(implementation: Implementation) -> Kernels:
    """A device's own kernels."""
    products, attention = ChainProducts(implementation), ChainAttention(implementation)
    draw = pallas.PallasDraw(implementation)
    how: Any = dict(own_tiles=TPU_TILES)
    if implementation.name in OF_A_GPU:
        how = dict(own_tiles=GPU_TILES, computes_padding=True, skips=False)
    return Kernels(implementation.name, products, attention, draw, head_tile=WIDE_HEAD_TILE, in_one=True, **how)


@functools.cache
def choose_kernels(name: str, model_config: ModelConfig, mesh: Mesh | None = None) -> Kernels:
    """The kernels of that name for a model on the first device, or on a mesh's, which share the weights; logged.

    "auto" is the device's own, or "xla", with a warning that says why, where they do not take this device or model or
    were not built. Raises ValueError for an unknown name, and for a name given that the device or the model does not
    fit.
    """
    check_kernels(name)
    if mesh is not None:
        own = choose_kernels(name, model_config)
        return sharded(own, checked_for(model_config, own, mesh))
    if name != "auto":
        return _named(name, model_config)
    wanted = OF_PLATFORM.get(jax.devices()[0].platform, "xla")
    try:
        return _named(wanted, model_config)
    except ValueError as error:
        log.warning("kernels: 'xla' in the place of %r: %s", wanted, error)
        return _named("xla", model_config)


def choose_for_all_replicas(name: str, model_config: ModelConfig, mesh: Mesh | None) -> Kernels:
    """choose_kernels for what shares rows: on a mesh of several replicas they are those of all its devices.

    Where the mesh has devices of several processes, they are those of this process's first replica, which is alone.
    """
    own = choose_kernels(name, model_config, mesh)
    if mesh is None or len(processes_of(mesh)) > 1:
        return own
    return dataclasses.replace(own, split=Split(with_all_axes(mesh)))


def _named(name: str, model_config: ModelConfig) -> Kernels:
    if name == "xla":
        log.info("kernels: xla")
        return XLA
    if name == "cpu":
        cpu_chain.check_model(model_config)
        log.info("kernels: cpu")
        return cpu_kernels(has_experts=model_config.num_experts > 0)
    implementation = implementations.choose(name)
    pallas.check_model(implementation, model_config)
    return kernels_of(implementation)
