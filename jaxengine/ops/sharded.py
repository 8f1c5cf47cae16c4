"""The decoder's ops on a mesh: each device runs its own kernels on the leaves that it owns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device.step_inputs import QueryBlocks
from jaxengine.ops.pallas import Pallas
from pallas_kernels.draw_reference import Draw
from sharding.leaves import tree_sum

WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Weights lie along the mesh's `axis` by leaves, and with them the heads of queries, keys, values and pages.

    XLA cannot split a kernel that it does not look into, so what each device does is said here; all else it computes whole, on each device,
    at the shapes that one device has. Devices exchange numbers by gathering alone, and a sum over leaves is finished in the order of the
    tree: the bits are those of one device with all leaves.
    """

    own: Pallas
    mesh: Mesh
    axis: str

    @property
    def name(self) -> str:
        return self.own.name

    @property
    def wide_rows(self) -> tuple[int, ...]:
        return self.own.wide_rows

    def parts(self) -> dict[str, Any]:
        return self.own.parts()

    @property
    def leaves(self) -> PartitionSpec:
        """Of `[leaf, …]`."""
        return PartitionSpec(self.axis)

    @property
    def heads(self) -> PartitionSpec:
        """Of `[B, r, heads, …]`."""
        return PartitionSpec(None, None, self.axis)

    @property
    def pages(self) -> PartitionSpec:
        """Of `[P, K, …]`."""
        return PartitionSpec(None, self.axis)

    def _on_each(self, function: Callable, inputs: tuple, outputs: Any) -> Callable:
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    # -- rows ------------------------------------------------------------------------------------------------------------------

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Each row from the device that has it; the others' words are 0, so that their sum as integers is the row, bit for bit."""

        def own(table, ids):
            ids -= jax.lax.axis_index(self.axis) * table.shape[0] * table.shape[1]
            here = (ids >= 0) & (ids < table.shape[0] * table.shape[1])
            words = jax.lax.bitcast_convert_type(self.own.embed(table, jnp.where(here, ids, 0)), jnp.uint32)
            return jax.lax.psum(jnp.where(here[:, None], words, 0), self.axis)

        words = self._on_each(own, (self.leaves, WHOLE), WHOLE)(table, ids)
        return jax.lax.bitcast_convert_type(words, jnp.float32)

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        return self._on_each(lambda x, w: self._gathered(self.own.outputs(x, w)), (WHOLE, self.leaves), WHOLE)(x, w)

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        """Each device keeps its own leaves', for the product behind it."""
        return self._on_each(self.own.gated, (WHOLE, self.leaves), self.leaves)(x, w)

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        """A device's leaves are a subtree: it adds those, gathers the others' sums and finishes the tree."""
        own = lambda x, w: tree_sum(self._gathered(self.own.summed(x, w)[None]))
        return self._on_each(own, (self.leaves, self.leaves), WHOLE)(x, w)

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        """Each device draws from all logits, which it has, and all come to the same token."""
        return self._on_each(self.own.draw_and_score, (WHOLE, WHOLE, WHOLE), WHOLE)(logits, given, uniforms)

    def _gathered(self, x: Float[Array, "leaf ..."]) -> Float[Array, "all ..."]:
        return jax.lax.all_gather(x, self.axis, tiled=True)

    # -- pages -----------------------------------------------------------------------------------------------------------------

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        place = lambda pool: jax.ShapeDtypeStruct(pool.shape, pool.dtype, sharding=NamedSharding(self.mesh, self.pages))
        keys, values = self.own.pools(model_config, num_pages, page_size)
        return place(keys), place(values)

    def as_pages(self, k: Float[Array, "B r K h"], v: Float[Array, "B r K h"]) -> tuple[Array, Array]:
        return self.own.as_pages(k, v)

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        return self.own.by_token(keys, values)

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Array:
        return self.own.tables(tables, blocks)

    def write(
        self,
        keys: Array,
        values: Array,
        k: Float[Array, "B r K h"],
        v: Float[Array, "B r K h"],
        tables: Array,
        blocks: QueryBlocks,
    ) -> tuple[Array, Array]:
        inputs = self.pages, self.pages, self.heads, self.heads, WHOLE, WHOLE
        return self._on_each(self.own.write, inputs, (self.pages, self.pages))(keys, values, k, v, tables, blocks)

    def attend(
        self,
        model_config: ModelConfig,
        keys: Array,
        values: Array,
        q: Float[Array, "B r H h"],
        tables: Array,
        blocks: QueryBlocks,
    ) -> Float[Array, "B r Hh"]:
        attend = lambda *args: self.own.attend(model_config, *args)
        return self._on_each(attend, (self.pages, self.pages, self.heads, WHOLE, WHOLE), self.heads)(
            keys, values, q, tables, blocks
        )
