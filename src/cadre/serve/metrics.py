"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from cadre.infer.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_BATCH = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Metrics:
    """A registry of this server alone, so that several can live in one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.first_token = Histogram(
            "cadre_time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_FIRST, **own
        )
        self.between_tokens = Histogram(
            "cadre_inter_token_seconds", "Between two tokens of a sequence.", buckets=_BETWEEN, **own
        )
        self.batch = Histogram("cadre_batch_size", "Sequences that got tokens in one step.", buckets=_BATCH, **own)
        self.finished = Counter("cadre_sequences_finished", "Sequences by why they ended.", ["reason"], **own)
        self.requests = Counter("cadre_requests", "HTTP requests by path and status.", ["path", "status"], **own)
        self.registry.register(EngineCollector(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector:
    """Reads the engine's own counters when asked. From another thread than the engine's: each number is whole, but two
    may be a step apart."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []  # nothing to check for duplicates before the engine runs

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats
        yield GaugeMetricFamily("cadre_sequences_waiting", "Sequences that wait to be admitted.", stats.waiting)
        yield GaugeMetricFamily("cadre_sequences_running", "Sequences admitted.", stats.running)
        yield CounterMetricFamily("cadre_prompt_tokens", "Prompt tokens of admitted sequences.", stats.prompt_tokens)
        yield CounterMetricFamily(
            "cadre_cached_prompt_tokens", "Those found in the cache (prefix sharing).", stats.cached_prompt_tokens
        )
        yield CounterMetricFamily("cadre_generated_tokens", "Tokens generated.", stats.generated_tokens)
        yield GaugeMetricFamily("cadre_cache_pages_used", "Cache pages that sequences hold.", stats.pages_used)
        yield GaugeMetricFamily("cadre_cache_pages", "Cache pages in all.", stats.pages_total)
        yield CounterMetricFamily("cadre_preemptions", "Sequences put back for lack of pages.", stats.preemptions)
        yield CounterMetricFamily("cadre_draft_tokens", "Tokens proposed by speculation.", stats.drafts_proposed)
        yield CounterMetricFamily("cadre_accepted_draft_tokens", "Those that held.", stats.drafts_accepted)
        config = self.engine.config
        layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
        load = CounterMetricFamily("cadre_expert_tokens", "Tokens routed to an expert.", labels=["layer", "expert"])
        for layer, row in zip(layers, stats.expert_load, strict=False):  # a dense model has none
            for expert, tokens in enumerate(row):
                load.add_metric([str(layer), str(expert)], tokens)
        yield load
