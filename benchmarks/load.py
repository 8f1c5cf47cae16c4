"""Many clients at one server, some of whom leave before the end: is each answered, does memory stay flat, how long do
tokens take?

    jaxengine serve calc --warm-up & python benchmarks/load.py --clients 512 --minutes 10 --pid $!

`--url` is any server that has OpenAI's /v1/completions with vLLM's `return_token_ids` and `ignore_eos`, so that vLLM's
own is measured by the same command. It is waited for until it answers. Prints Markdown. Ends with 1 where a request was
lost or the server keeps one.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import ssl
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

MAX_TOKENS = 8, 64  # of a request, at random
PATIENCE = 2.0  # seconds within which a client leaves that does not wait for tokens
STARTING = 900  # seconds in which the server has to come up
QUIET = 30  # seconds after the end within which the server has to be idle
PROC = Path("/proc")
GAUGES = "vllm:num_requests_running", "vllm:num_requests_waiting"


@dataclasses.dataclass
class Load:
    """What the clients do, and what they saw."""

    url: str
    model: str
    key: str | None = None
    clients: int = 512
    leaving: float = 0.3  # the part of the requests whose client leaves before their end
    seconds: float = 600.0
    pid: int | None = None  # of the server, for its memory
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    losses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: list[float] = dataclasses.field(default_factory=list)  # seconds to the first token, of each request
    between: list[float] = dataclasses.field(default_factory=list)  # from a chunk with tokens to the next one
    memory: list[int] = dataclasses.field(default_factory=list)  # bytes, once a second
    num_tokens: int = 0
    took: float = 0.0  # seconds until the last request had ended
    remaining: float | None = None  # requests that the server has in the end, None where it does not say

    async def run(self) -> None:
        context = ssl.create_default_context()  # one for all: each takes long to make
        async with self._http(context) as http:
            await _started(http)
        start = time.monotonic()
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(i, start + self.seconds, context) for i in range(self.clients)))
        watch.cancel()
        self.took = time.monotonic() - start
        async with self._http(context) as http:
            self.remaining = await _remaining(http)

    def _http(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=300, verify=context)

    async def _watch(self) -> None:
        while self.pid is not None:
            self.memory.append(resident(self.pid))
            await asyncio.sleep(1)

    async def _client(self, index: int, stop_at: float, context: ssl.SSLContext) -> None:
        rng = random.Random(index)
        async with self._http(context) as http:
            while time.monotonic() < stop_at:
                try:
                    end = await self._request(http, rng)
                except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                    end = self._lost(f"{type(error).__name__}: {error}")
                self.ends[end] += 1
                if end == "refused":
                    await asyncio.sleep(rng.uniform(0.5, 1.5))

    async def _request(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        """How one request ended. A client leaves after some tokens, or after a time, when it may have none yet."""
        count, leaves = rng.randint(*MAX_TOKENS), rng.random() < self.leaving
        by_tokens = leaves and rng.random() < 0.5
        enough = rng.randrange(1, count) if by_tokens else count + 1
        patience = rng.uniform(0, PATIENCE) if leaves and not by_tokens else None
        body = {"model": self.model, "prompt": f"{rng.randrange(1000)}+{rng.randrange(1000)}=", "max_tokens": count}
        body |= {"stream": True, "ignore_eos": True, "return_token_ids": True, "seed": rng.randrange(2**31)}
        sent = time.monotonic()
        try:
            async with asyncio.timeout(patience), http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 429:
                    return "refused"
                if response.status_code != 200:
                    return self._lost(f"status {response.status_code}")
                seen = await self._read(response, sent, enough)
        except TimeoutError:
            return "left"
        if seen == enough:
            return "left"
        return "answered" if seen == count else self._lost(f"{seen} of {count} tokens and the end")

    async def _read(self, response: httpx.Response, last: float, enough: int) -> int:
        """The number of tokens of a stream that ended as it should, or `enough` once there are so many; of one that
        broke off ValueError. `last` is when it was asked for.
        """
        seen, reason = 0, None
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]" and reason == "length":
                return seen
            if data and data != "[DONE]":
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                (choice,) = chunk["choices"]
                new, now = len(choice["token_ids"] or ()), time.monotonic()
                reason = reason or choice["finish_reason"]
                if new:
                    (self.between if seen else self.first).append(now - last)
                    last, seen, self.num_tokens = now, seen + new, self.num_tokens + new
                if seen >= enough:
                    return enough
        raise ValueError(f"a stream broke off after finish reason {reason}")

    def _lost(self, why: str) -> str:
        self.losses[why[:200]] += 1
        return "lost"

    # -- what is printed ----------------------------------------------------------------------------------------------

    @property
    def is_good(self) -> bool:
        """Whether every request was answered, refused or left by its client, and the server has none any more."""
        return not self.losses and not self.remaining

    def report(self) -> str:
        counts = ", ".join(f"{self.ends[end]} {end}" for end in ("answered", "refused", "left", "lost"))
        lines = [
            f"{self.clients} clients for {self.seconds:.0f} s at {self.url}: {counts}; "
            f"{self.num_tokens / self.took:.0f} tokens per second; in the end the server has "
            f"{'an unknown number of' if self.remaining is None else f'{self.remaining:.0f}'} requests",
            *(f"- lost {count} times: {why}" for why, count in self.losses.most_common()),
            "",
            "| milliseconds | p50 | p90 | p99 | of |",
            "|---|---|---|---|---|",
            _row("to the first token", self.first),
            _row("between tokens", self.between),
        ]
        if self.memory:
            tenths = [self.memory[i * (len(self.memory) - 1) // 10] / 2**20 for i in range(11)]
            lines += [
                "",
                "server's memory in MB, from the first second to the last: " + " ".join(f"{x:.0f}" for x in tenths),
            ]
        return "\n".join(lines)


def _row(name: str, seconds: list[float]) -> str:
    marks = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [float("nan")] * 99
    return f"| {name} | " + " | ".join(f"{1000 * marks[p - 1]:.1f}" for p in (50, 90, 99)) + f" | {len(seconds)} |"


async def _started(http: httpx.AsyncClient) -> None:
    """Returns once the server answers. Raises httpx.ConnectError where it does not within STARTING seconds."""
    end = time.monotonic() + STARTING
    while True:
        try:
            await http.get("/health")
            return
        except httpx.ConnectError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.2)


async def _remaining(http: httpx.AsyncClient) -> float | None:
    """Requests that /metrics tells of once it tells of none, or after QUIET seconds; None where it tells nothing."""
    end = time.monotonic() + QUIET
    while True:
        lines = (await http.get("/metrics")).text.splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(GAUGES)]
        if not found or not sum(found) or time.monotonic() > end:
            return sum(found) if found else None
        await asyncio.sleep(0.1)


def resident(pid: int) -> int:
    """Bytes that a process and those below it hold in memory; Linux alone says."""
    parents = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    tree, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        tree |= new
    return sum(map(_resident_of_one, tree))


def _resident_of_one(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="calc", help="the name under which it is served")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--leaving", type=float, default=0.3, help="the part of the requests that are left")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    given = parser.parse_args(arguments)
    load = Load(given.url, given.model, given.api_key, given.clients, given.leaving, 60 * given.minutes, given.pid)
    asyncio.run(load.run())
    print(load.report())
    return 0 if load.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
