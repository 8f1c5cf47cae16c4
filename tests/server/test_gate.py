"""Keys, web pages, limits, and clients that go away."""

import contextlib
import dataclasses

import httpx
import pytest
from serving import ADMIN, KEY, running

from jaxengine.server.app import ROUTES
from jaxengine.server.gate import ADMIN as ADMIN_PATHS
from jaxengine.server.settings import ServerConfig

LONG = dict(prompt="1+", max_tokens=480, ignore_eos=True)


@pytest.mark.parametrize("route", [*ROUTES, "GET /", "GET /docs", "POST /v1/nothing"])
def test_every_route_but_health_needs_a_key(served, route):
    method, path = route.split()
    statuses = [
        served.nobody.request(method, path, headers=headers).status_code
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer"})
    ]
    assert statuses == [200 if path in ("/health", "/liveness") else 401] * 4


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_what_changes_the_engine_needs_the_admin_key(served, path):
    response = served.user.post(path)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert not served.llm.is_paused and not served.llm.is_sleeping


def test_the_admin_key_opens_what_the_key_opens(served):
    assert served.admin.get("/v1/models").status_code == 200


def test_without_keys(calc):
    with running(calc, max_open_requests=1) as server:
        assert server.nobody.get("/v1/models").status_code == 200
        assert server.admin.post("/pause").json()["error"]["code"] == "no_admin_key"
        web_page = server.nobody.post("/v1/completions", json=LONG, headers={"Origin": "http://evil.example"})
        assert web_page.status_code == 403
        with server.nobody.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()  # kept: collected, it would close the stream
            next(lines)
            refused = server.admin.post("/v1/completions", json=LONG)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert server.admin.get("/health").status_code == 200
        server.wait_until(server.is_idle)


def test_settings_that_would_let_others_in_are_refused():
    with pytest.raises(ValueError, match="--api-key"):
        ServerConfig("calc", host="0.0.0.0")
    with pytest.raises(ValueError, match="empty"):
        ServerConfig("calc", api_key="")
    assert ServerConfig("calc", host="0.0.0.0", api_key=KEY).admin_key is None and ADMIN != KEY


def test_a_full_queue_is_429_and_takes_nothing(served, monkeypatch):
    engine = served.llm.engine
    monkeypatch.setattr(engine, "engine_config", dataclasses.replace(engine.engine_config, max_waiting=3))
    for stream in (False, True):
        response = served.user.post("/v1/completions", json=LONG | {"n": 4, "stream": stream})
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert served.is_idle()


def test_a_queue_that_fills_after_the_check_is_429_too(served, monkeypatch):
    """Between check and queue others come in: the engine itself refuses."""
    engine = served.llm.engine
    monkeypatch.setattr(engine, "engine_config", dataclasses.replace(engine.engine_config, max_waiting=3))
    monkeypatch.setattr("jaxengine.server.service.Service.check_room", lambda *_: None)
    for stream in (False, True):
        assert served.user.post("/v1/completions", json=LONG | {"n": 4, "stream": stream}).status_code == 429
    assert served.is_idle()


def test_a_client_that_leaves_a_stream_aborts_it(served):
    with served.user.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 3}) as response:
        lines = response.iter_lines()
        next(lines)
        assert len(served.llm.engine.requests) == 1
    served.wait_until(served.is_idle)


def test_a_client_that_leaves_while_it_waits_aborts_its_request(served):
    served.llm.pause()
    with contextlib.suppress(httpx.ReadTimeout):
        served.user.post("/v1/completions", json=LONG, timeout=0.5)
    served.wait_until(served.is_idle)  # paused all the while
    served.llm.resume()


def test_an_error_of_the_engine_is_500_and_the_next_request_goes(served, monkeypatch):
    step = served.llm.engine.step

    def broken():
        monkeypatch.setattr(served.llm.engine, "step", step)
        raise ArithmeticError("at 0x7f00")

    monkeypatch.setattr(served.llm.engine, "step", broken)
    response = served.user.post("/v1/completions", json=LONG)
    assert response.status_code == 500 and "0x7f00" not in response.text
    assert served.user.get("/health").status_code == 503
    assert served.user.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200
    assert served.user.get("/health").status_code == 200
