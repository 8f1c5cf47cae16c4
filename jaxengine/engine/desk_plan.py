"""A plan from a desk: an engine's steps compiled for devices that are not there, and what memory they leave.

All layers of a model are alike, so that a program of `BASE_LAYERS` layers and one of a layer more tell all: what the
second has more than the first, every further layer has too. Of one layer a GPU's workspace is smaller than of any other
number, so that it is no base. tests/aot holds all of it against a whole model.
"""

import concurrent.futures
import dataclasses
import time
from collections import Counter
from typing import Any

from jaxengine.base import machine
from jaxengine.config import QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.device import kv_cache
from jaxengine.device.needs import Needs
from jaxengine.engine.memory import abstract_weights, bytes_of_page, pages_in, size_on_one, whole_context
from jaxengine.engine.step_variants import Variant, step_of, variants_of
from jaxengine.ops.kernels import Kernels, checked_for, kernels_of, sharded
from jaxengine.ops.pallas import check_model
from pallas_kernels.implementations import choose
from sharding.devices import FIGURES
from sharding.mesh import make_mesh, replicas
from sharding.topology import Compiled, Target, compile_ahead, devices_of

BASE_LAYERS = 2
OWN_KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}  # of a platform


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A step at its widest, on each device."""

    kind: str  # "decode" or "prefill"
    rows: int  # tokens of the step
    tile: int  # of them, that a loop takes at a time
    tiles: int
    runs: int  # of each layer: once a tile, or once for all rows where kernels need no loop
    workspace: int  # bytes beside weights and cache
    kernels: dict[str, int]  # calls of one tile, by name
    collectives: dict[str, int]  # how many the step runs, by kind
    received: dict[str, int]  # bytes that they bring, by kind

    @property
    def all_received(self) -> int:
        return sum(self.received.values())


@dataclasses.dataclass(frozen=True)
class DeskPlan:
    """Bytes on each of the devices that share one replica, and its steps."""

    target: str
    degree: int
    num_replicas: int
    compiled_layers: tuple[int, ...]
    seconds: float  # that compiling took
    memory: int  # of a device, and of it `usable` for the engine
    usable: int
    weights: int
    slots: int  # histories and token rules
    page_bytes: int
    num_pages: int  # that are left room for; 0 or less: weights and workspace do not fit
    steps: dict[str, StepPlan]

    @property
    def workspace(self) -> int:
        return max(step.workspace for step in self.steps.values())

    def requests(self, context: int, page_size: int) -> int:
        """How many of `context` tokens the pages hold at once; page 0 is scratch."""
        return max(0, self.num_pages - 1) // -(-context // page_size)


def kernels_for(model_config: ModelConfig, target: Target, degree: int) -> tuple[Any, Kernels]:
    """(a mesh of replicas that fills the target, or of one device that shares nothing, the devices' own kernels on it).

    Raises ValueError as choose_kernels does.

    Of a large slice the TPU's compiler takes no part alone but one device: it numbers devices as they lie in the whole.
    """
    devices = devices_of(target) if degree > 1 else devices_of(target)[:1]
    mesh = make_mesh(tensor=degree, data=len(devices) // degree, devices=devices)
    implementation = choose(OWN_KERNELS[target.platform], devices[0].device_kind)
    check_model(implementation, model_config)
    own = kernels_of(implementation)
    checked_for(model_config, own, replicas(mesh)[0])
    return mesh, own if degree == 1 else sharded(own, mesh)


def desk_plan(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    target: Target,
    degree: int,
    num_replicas: int,
    needs: Needs = Needs.PLAIN,
) -> DeskPlan:
    """The plan of one of `num_replicas` replicas, which `degree` devices share, for requests that ask for `needs`.

    Raises ValueError where they cannot share the model.
    """
    mesh, kernels = kernels_for(model_config, target, degree)
    engine_config = dataclasses.replace(engine_config, num_pages=whole_context(engine_config))
    layers = sorted({min(n, model_config.num_hidden_layers) for n in (BASE_LAYERS, BASE_LAYERS + 1)})
    few = [dataclasses.replace(model_config, num_hidden_layers=n) for n in layers]
    variants = variants_of(model_config, engine_config, kernels)
    widest, batch = variants.widest(needs), variants.batch
    wanted = [(variant, config) for variant in widest for config in few]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(min(len(wanted), machine.num_threads())) as threads:
        done = list(threads.map(lambda each: compiled(mesh, kernels, engine_config, *each), wanted))
    seconds, steps = time.monotonic() - start, {}
    for number, variant in enumerate(widest):
        programs = done[number * len(few) : (number + 1) * len(few)]
        rows = batch.decode_rows if variant.kind == "decode" else batch.prefill_query_blocks * QUERY_BLOCK
        steps[variant.kind] = step_plan(variant, rows, programs, model_config.num_hidden_layers, in_one=kernels.in_one)
    weights = size_on_one(abstract_weights(model_config, kernels))
    page_bytes, memory = bytes_of_page(model_config, engine_config, kernels), FIGURES[target.generation].memory
    usable = int(memory * engine_config.gpu_memory_utilization)
    room = usable - weights - max(step.workspace for step in steps.values())
    return DeskPlan(
        target=str(target),
        degree=degree,
        num_replicas=num_replicas,
        compiled_layers=tuple(layers),
        seconds=seconds,
        memory=memory,
        usable=usable,
        weights=weights,
        slots=size_on_one(kv_cache.abstract_slots(model_config, engine_config)),
        page_bytes=page_bytes,
        num_pages=pages_in(room, model_config, engine_config, page_bytes),
        steps=steps,
    )


def compiled(
    mesh: Any, kernels: Kernels, engine_config: EngineConfig, variant: Variant, model_config: ModelConfig
) -> Compiled:
    """The step as the devices' own compiler makes it."""
    variants = variants_of(model_config, engine_config, kernels)
    inputs, how = variants.call(variant)
    state = abstract_weights(model_config, kernels), kv_cache.abstract(model_config, engine_config, kernels)
    step = step_of(variant.kind, on_gpu=mesh.devices.flat[0].platform != "tpu")
    return compile_ahead(mesh, step, *state, *inputs, **how)


def step_plan(variant: Variant, rows: int, programs: list[Compiled], layers: int, *, in_one: bool) -> StepPlan:
    """The step of a whole model, from programs of BASE_LAYERS layers and of one more."""
    tile, tiles = variant.tile.rows, -(-rows // variant.tile.rows)

    def whole(of: Any) -> dict[str, int]:
        first, last = (Counter(of(programs[i])) for i in (0, -1))
        return {name: first[name] + (layers - BASE_LAYERS) * (last[name] - first[name]) for name in sorted(last)}

    def count(program: Compiled) -> dict[str, int]:
        return _by_kind(program, lambda collective: collective.times(tile, tiles))

    def received(program: Compiled) -> dict[str, int]:
        return _by_kind(program, lambda collective: collective.received * collective.times(tile, tiles))

    return StepPlan(
        kind=variant.kind,
        rows=rows,
        tile=tile,
        tiles=tiles,
        runs=1 if in_one else tiles,
        workspace=whole(lambda program: {"bytes": program.beside_arguments})["bytes"],
        kernels=whole(lambda program: Counter(program.kernels)),
        collectives=whole(count),
        received=whole(received),
    )


def _by_kind(program: Compiled, of: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for collective in program.collectives:
        found[collective.kind] += of(collective)
    return found
