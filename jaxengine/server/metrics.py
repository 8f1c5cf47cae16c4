"""Prometheus metrics under vLLM's names, so that its dashboards read them."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxengine.llm import LLM
from jaxengine.outputs import RequestDelta, RequestOutput

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LABELS = ("model_name",)


class Metrics:
    """A registry of its own, so that several servers of one process count apart."""

    def __init__(self, llm: LLM, model_name: str) -> None:
        self._registry, self._name = CollectorRegistry(), model_name
        self._registry.register(_EngineState(llm, model_name))
        count = lambda name, text: Counter(f"vllm:{name}", text, LABELS, registry=self._registry).labels(model_name)
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts that were answered.")
        self.generation_tokens = count("generation_tokens", "Tokens drawn.")
        self.cache_queries = count("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.")
        self.cache_hits = count("prefix_cache_hits", "Tokens of prompts that were found there.")
        self.first_token = self._seconds("time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens = self._seconds("inter_token_latency_seconds", "From a step's tokens to the next step's.")
        self.whole = self._seconds("e2e_request_latency_seconds", "From a request to its end.")
        labels = (*LABELS, "finished_reason")
        self._ended = Counter("vllm:request_success", "Samples that ended.", labels, registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        whole = Histogram(f"vllm:{name}", text, LABELS, buckets=SECONDS, registry=self._registry)
        return whole.labels(self._name)

    def clock(self, num_requests: int) -> "Clock":
        """Measures the requests of one call, from now on."""
        return Clock(self, num_requests)

    def ended(self, output: RequestOutput) -> None:
        """Count a request that has ended."""
        length = len(output.prompt_token_ids)
        self.prompt_tokens.inc(length)
        self.cache_queries.inc(length)
        self.cache_hits.inc(output.num_cached_tokens)
        for sample in output.outputs:
            self._ended.labels(self._name, sample.finish_reason).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self._registry)


class Clock:
    """When the requests of one call had their tokens."""

    def __init__(self, metrics: Metrics, num_requests: int) -> None:
        self._metrics, self._start = metrics, time.monotonic()
        self._last: list[float | None] = [None] * num_requests

    def saw(self, index: int, delta: RequestDelta) -> None:
        """Count what the `index`-th request gained just now."""
        now, metrics, last = time.monotonic(), self._metrics, self._last[index]
        count = sum(len(new.token_ids) for new in delta.outputs)
        if count and last is None:
            metrics.first_token.observe(now - self._start)
        elif count and last is not None:
            metrics.between_tokens.observe(now - last)
        if count:
            metrics.generation_tokens.inc(count)
            self._last[index] = now
        if delta.output is not None:
            metrics.whole.observe(now - self._start)
            metrics.ended(delta.output)


class _EngineState(Collector):
    """What the engine is doing at the moment it is asked."""

    def __init__(self, llm: LLM, model_name: str) -> None:
        self._llm, self._name = llm, model_name

    def collect(self) -> Iterator[Metric]:
        now = self._llm.engine.occupancy()
        is_paused = self._llm.is_paused or self._llm.is_sleeping
        for name, text, value in (
            ("num_requests_running", "Samples that have a slot.", now.running),
            ("num_requests_waiting", "Samples that wait for one.", now.waiting),
            ("kv_cache_usage_perc", "The part of the pool's pages that is held, 0 to 1.", now.held_pages / now.pages),
            ("engine_pause_state", "1 while no step may begin.", int(is_paused)),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            gauge.add_metric([self._name], value)
            yield gauge
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Samples that lost their pages.", labels=LABELS)
        preemptions.add_metric([self._name], now.preemptions)
        yield preemptions
