"""The server against its own description: requests made from the schema, valid ones and not (schemathesis)."""

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.serve.live import Live

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
POSTED = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
ALL = [("GET", path) for path in ("/v1/models", "/v1/models/{name}", "/health", "/metrics")]
ALL += [("POST", path) for path in POSTED]


@pytest.fixture(scope="module")
def server():
    with Live() as server:
        yield server
        server.until(server.idle)  # whatever was asked, nothing is left of it


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def check(description, method, path, mode, examples):
    session = requests.Session()  # one connection for all

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def answers_are_as_described(case):
        if isinstance(case.body, dict) and "completions" in path and mode is GenerationMode.POSITIVE:
            case.body["max_tokens"] = 3  # the point is not to generate
            case.body.pop("max_completion_tokens", None)
        case.call_and_validate(checks=CHECKS, session=session)

    answers_are_as_described()


@pytest.mark.parametrize("method, path", ALL)
def test_valid_requests(description, method, path):
    check(description, method, path, GenerationMode.POSITIVE, 30 if method == "POST" else 3)


@pytest.mark.parametrize("path", POSTED)
def test_invalid_requests(description, path):
    check(description, "POST", path, GenerationMode.NEGATIVE, 30)


def test_the_requests_were_of_both_kinds(server):
    """Else the tests above would say little."""
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith("cadre_requests_total")]
    for path in POSTED:
        for status in (200, 400):
            assert any(f'path="{path}",status="{status}"' in line for line in lines)


def test_the_description(server):
    described = server.get("/openapi.json").json()
    assert set(described["paths"]) == {path for _, path in ALL}
    for operations in described["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in described["components"]["schemas"]
