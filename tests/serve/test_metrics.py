import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.live import CONTEXT, Live, parts
from tests.serve.test_server import LONG, start

PROMPT = list(range(20, 70))


def samples(server):
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def ends(found):
    return {key[1][1]: value for key, value in found.items() if key[0] == "cadre_sequences_finished_total"}


def test_what_happened_is_told():
    with Live() as server:
        before = samples(server)
        assert before["cadre_generated_tokens_total",] == 0
        assert before["cadre_cache_pages",] == server.engine.pool.pages
        for _ in range(2):
            server.complete(PROMPT, max_tokens=9, n=2, ignore_eos=True)
        server.post("/v1/completions", {"prompt": "", "ignore_eos": True})  # else its first token may be its end
        server.post("/v1/completions", {"prompt": "x", "n": 0})
        server.until(server.idle)
        after = samples(server)
        generated = server.engine.stats.generated_tokens
    assert generated >= 36 and after["cadre_generated_tokens_total",] == generated
    assert after["cadre_prompt_tokens_total",] == 4 * len(PROMPT) + 1
    assert after["cadre_cached_prompt_tokens_total",] >= 2 * 48
    assert after["cadre_time_to_first_token_seconds_count",] == 5
    assert after["cadre_time_to_first_token_seconds_sum",] > 0
    assert after["cadre_inter_token_seconds_count",] == generated - 5
    assert after["cadre_batch_size_sum",] == generated
    assert after["cadre_sequences_finished_total", ("reason", "length")] >= 4
    assert after["cadre_requests_total", ("path", "/v1/completions"), ("status", "200")] == 3
    assert after["cadre_requests_total", ("path", "/v1/completions"), ("status", "400")] == 1
    for name in ("cadre_sequences_waiting", "cadre_sequences_running", "cadre_cache_pages_used", "cadre_preemptions_total"):
        assert after[name,] == 0
    assert after["cadre_draft_tokens_total",] == after["cadre_accepted_draft_tokens_total",] == 0


def test_why_sequences_end_is_told_of_those_that_the_engine_did_not_end():
    """A transcript's answer ends with its line, and a client may leave: the engine is then told to stop."""
    newline = str(parts()[1].encode("\n").ids[0])
    body = {"messages": [{"role": "user", "content": "hi"}], "seed": 0, "ignore_eos": True, "logit_bias": {newline: 4}}
    with Live(chat=False) as server:
        answer = server.post("/v1/chat/completions", body).json()
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["total_tokens"] < CONTEXT
        start(server, LONG | {"n": 2}).close()
        server.until(server.idle)
        after = samples(server)
    assert ends(after) == {"stop": 1, "abort": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_sequences_whose_time_is_over_end_by_their_deadline_whoever_sees_it_first(stream):
    with Live(timeout=0.3) as server:
        with server.held():
            server.post("/v1/completions", LONG | {"n": 2, "stream": stream})
        server.until(server.idle)
        assert ends(samples(server)) == {"deadline": 2}


def test_the_experts_loads_add_up():
    with Live() as server:
        server.complete(PROMPT, max_tokens=10, ignore_eos=True)
        server.until(server.idle)
        loads = {key: value for key, value in samples(server).items() if key[0] == "cadre_expert_tokens_total"}
    config = parts()[0].config
    assert {dict(key[1:])["layer"] for key in loads} == {"1"}  # the second layer is the sparse one
    assert len(loads) == config.n_routed_experts
    # Every position read chose its experts: the prompt, and all new tokens but the last.
    assert sum(loads.values()) == (len(PROMPT) + 9) * config.num_experts_per_tok


def test_the_queue_is_seen():
    with Live(max_batch=1) as server:
        waiting = [start(server, LONG | {"n": 3}) for _ in range(2)]
        server.until(lambda: samples(server)["cadre_sequences_running",] == 1)
        seen = samples(server)
        assert seen["cadre_sequences_waiting",] > 1 and seen["cadre_cache_pages_used",] > 0
        for connection in waiting:
            connection.close()
        server.until(server.idle)
