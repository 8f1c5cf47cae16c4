"""A step's plan as plain numbers: what several processes compare, and what is shown where they differ."""

import hashlib
from typing import NamedTuple

from jaxengine.host.plan import Plan
from jaxengine.host.sample import Request, Sample


class PlanRecord(NamedTuple):
    """What a plan tells the device, with no reference to samples, which change. Its repr is what is hashed and shown.

    Of a running sample a page that is new to it is told by the number of its pages and the last one: the record takes
    as long at the end of a long context as at its beginning.
    """

    admitted: list[
        tuple[str, int, int, int, str, tuple[int, ...]]
    ]  # (request id, sample, slot, version, digest, pages)
    decodes: list[tuple[int, int, int]]  # (slot, position, count)
    chunks: list[tuple[int, int, int, list[tuple[int, int, bool]]]]  # (slot, start, stop, rows)
    copies: list[tuple[int, int]]  # pages (from, to)
    grown: list[tuple[int, int, int]]  # (slot, number of pages, the last page)


def record(plan: Plan) -> PlanRecord:
    """The plan's record, to be made before a step of it runs."""
    requests = {id(sample.request): sample.request for sample in plan.admitted}
    digests = {name: request_digest(request) for name, request in requests.items()}
    return PlanRecord(
        [_admitted(sample, digests[id(sample.request)]) for sample in plan.admitted],
        [(sample.slot, position, count) for sample, position, count in plan.decodes],
        [(chunk.sample.slot, chunk.start, chunk.stop, _rows(chunk.rows)) for chunk in plan.chunks],
        list(plan.copies),
        [(sample.slot, len(sample.pages), sample.pages[-1]) for sample in plan.grown if sample.pages],
    )


def request_digest(request: Request) -> str:
    """Hash of all that a request's draws depend on: prompt, sampling parameters, key, and where it ends."""
    parts = (request.prompt_token_ids, request.sampling, request.key, request.prompt_index, request.limit)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _admitted(sample: Sample, digest: str) -> tuple[str, int, int, int, str, tuple[int, ...]]:
    return sample.request.request_id, sample.index, sample.slot, sample.version, digest, tuple(sample.pages)


def _rows(rows: list) -> list[tuple[int, int, bool]]:
    return [(sample.slot, position, scored) for sample, position, scored in rows]
