"""Replicas whose devices belong to several processes: each process steps its own, and none plans for another.

Every process is given the same requests in the same order, and places them by a rule that looks at nothing but the
requests: no process has to ask another. What the replicas answered travels once, where a call ends and all come
together; until then a request that is served elsewhere has no tokens here.
"""

import json
from collections.abc import Mapping, Sequence

import jax

from jaxengine.config import EngineConfig
from jaxengine.engine.answers import answer_of, take_answer
from jaxengine.engine.engine import Engine, give_detokenizers
from jaxengine.engine.lockstep import Lockstep, as_one
from jaxengine.engine.replicas import Replicas
from jaxengine.host.sample import Request, Sample
from sharding.distributed import gathered


class SpreadReplicas(Replicas):
    """`engines` are this process's, by the number of the replica; `owners` the process that tells of each replica."""

    def __init__(
        self, engine_config: EngineConfig, engines: Mapping[int, Engine], owners: Sequence[int], lockstep: Lockstep
    ) -> None:
        super().__init__(engine_config, list(engines.values()))
        self.lockstep = self._lockstep = lockstep
        self._own, self._owners = dict(engines), list(owners)
        self._requests: dict[str, Request] = {}  # of all replicas, since answers last travelled
        self._replica_of: dict[str, int] = {}
        self._loads = [0] * len(owners)  # samples of those requests

    @property
    def num_replicas(self) -> int:
        return len(self._owners)

    @property
    def requests(self) -> dict[str, Request]:
        """All whose answers have not travelled yet."""
        return self._requests

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def owes_answers(self) -> bool:
        return self.has_work

    def loads(self) -> tuple[list[int], int]:
        return self._loads, sum(self._loads)

    def _serve(self, replica: int, request: Request, with_text: bool) -> None:
        if replica in self._own:
            self._own[replica].add(request, with_text=with_text)
        else:
            request.samples = [Sample.of(request, index, index) for index in range(request.sampling.n)]
            give_detokenizers(request, self.tokenizer, with_text)
        if not request.is_finished:
            self._requests[request.request_id], self._replica_of[request.request_id] = request, replica
            self._loads[replica] += request.sampling.n

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._loads[self._replica_of.pop(request_id)] -= request.sampling.n
            for sample in request.samples:
                sample.end("abort")

    def step(self) -> list[Request]:
        """A step of this process's replicas; where they have no more to do, all processes tell their answers."""
        if any(engine.has_work for engine in self.engines):
            self._lockstep.is_busy = True  # with what it does alone: the others wait for it as long as it lives
            return super().step()
        return self._told()

    def _told(self) -> list[Request]:
        """The requests of all replicas, answered."""
        me = jax.process_index()
        with as_one(self._lockstep, ("answers", tuple(self._requests))):
            self._lockstep.is_busy = False
            own = [name for name in self._requests if self._owners[self._replica_of[name]] == me]
            told = gathered(json.dumps({name: answer_of(self._requests[name]) for name in own}).encode())
        for answers in map(json.loads, told):
            for name, answer in answers.items():
                if self._replica_of[name] not in self._own:
                    take_answer(self._requests[name], answer)
        ended = list(self._requests.values())
        self._forget()
        return ended

    def drop_weights(self) -> None:
        super().drop_weights()
        self._forget()

    def _forget(self) -> None:
        self._requests, self._replica_of, self._loads = {}, {}, [0] * len(self._owners)
