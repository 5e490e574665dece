import json
import socket

import pytest

from cadre.serve.schema import MAX_BODY_BYTES
from tests.serve.live import Live, http

KEY = "sk-Schlüssel"


@pytest.fixture(scope="module")
def keyed():
    with Live(api_key=KEY, hosts=["Models.example.org"], local=True) as server:
        yield server


def raw_status(server, headers, path="/v1/models"):
    """Status and error code of a GET with exactly these headers."""
    lines = [f"GET {path} HTTP/1.1", *headers, "Connection: close", "", ""]
    with server.connect("\r\n".join(lines).encode()) as connection:
        answer = connection.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), (json.loads(body).get("error") or {}).get("code")


@pytest.mark.parametrize("header", [
    None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Bearer \xff",
])  # fmt: skip
def test_without_the_key_nothing_is_told(keyed, header):
    headers = [] if header is None else [("authorization", header.encode("utf-8"))]
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/v1/models/tiny"):
        answer = keyed.get(path, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_key(keyed, scheme):
    assert keyed.get("/v1/models", headers=[("authorization", f"{scheme} {KEY}".encode())]).status_code == 200


def test_health_and_the_page_are_open(keyed):
    assert keyed.get("/health").json() == {"status": "ok"}
    assert keyed.get("/").status_code == 200
    assert keyed.get("/page/style.css").status_code == 200


@pytest.mark.parametrize("host, allowed", [
    ("localhost", True), ("127.0.0.1:8000", True), ("[::1]:80", True), ("LOCALHOST:1", True), ("models.example.org", True),
    ("127.0.0.2:8000", True), ("127.255.1.9", True), ("128.0.0.1", False), ("127.0.0.1.evil.example", False),
    ("evil.example", False), ("localhost.evil.example", False), ("evil.example:8000", False), ("", False), ("[", False),
    ("127.0.0.1@evil.example", False),
])  # fmt: skip
def test_only_by_its_own_names(keyed, host, allowed):
    """A page whose name was pointed at this address reads nothing."""
    assert raw_status(keyed, [f"Host: {host}"], "/health") == ((200, None) if allowed else (403, "unknown_host"))


@pytest.mark.parametrize("origin, allowed", [
    ("http://localhost:8000", True), ("https://LOCALHOST:8000", True), ("https://models.example.org", True),
    ("http://localhost:9000", False), ("http://localhost", False), ("https://evil.example", False), ("null", False),
    ("http://localhost:8000.evil.example", False), ("", False), ("http://[", False), ("http://127.0.0.1:8000", False),
])  # fmt: skip
def test_pages_of_other_sites_are_refused(keyed, origin, allowed):
    answer = raw_status(keyed, ["Host: localhost:8000", f"Origin: {origin}"], "/health")
    assert answer == ((200, None) if allowed else (403, "foreign_origin"))


def test_any_host_where_none_is_named(live):
    assert raw_status(live, ["Host: models.example.org"]) == (200, None)
    assert raw_status(live, ["Host: a.example", "Origin: http://b.example"]) == (403, "foreign_origin")
    assert raw_status(live, ["Host: 10.0.0.3:8000", "Origin: http://10.0.0.3:8000"]) == (200, None)
    with Live(hosts=["models.example.org"]) as server:
        for host in ("10.0.0.3:8000", "cadre:8000"):  # as a proxy may call it
            assert raw_status(server, [f"Host: {host}", "Origin: https://models.example.org"]) == (200, None)
        assert raw_status(server, ["Host: 10.0.0.3:8000", "Origin: https://b.example"]) == (403, "foreign_origin")


def test_a_name_that_was_pointed_here_serves_no_pages(live):
    """On any address a page could be of a site whose own name was made to mean this server (DNS rebinding)."""
    page = ["Host: a.example:8000", "Origin: http://a.example:8000"]
    assert raw_status(live, page) == (403, "unknown_host")
    machine = socket.gethostname()
    for name in (machine, f"{machine.upper()}.local:80", "[fe80::1]:80", "localhost"):
        assert raw_status(live, [f"Host: {name}", f"Origin: http://{name}"]) == (200, None)
    assert raw_status(live, [f"Host: {machine}.a.example", f"Origin: http://{machine}.a.example"]) == (403, "unknown_host")
    with Live(hosts=["a.example"]) as server:
        assert raw_status(server, page) == (200, None)
    with Live(api_key=KEY) as server:
        assert raw_status(server, page, "/health") == (200, None)


@pytest.mark.parametrize("host", ["a.example:8000", "[fe80::1]:8000"])
def test_the_name_that_a_refusal_tells_is_the_one_to_allow(host):
    """And a port with it does no harm."""
    with Live(local=True) as server:
        told = server.get("/health", headers={"host": host}).json()["error"]["message"].split("'")[1]
    for name in (told, host.upper()):
        with Live(local=True, hosts=[name, ""]) as server:
            assert raw_status(server, [f"Host: {host}"], "/health") == (200, None)
            assert raw_status(server, ["Host: "], "/health") == (403, "unknown_host")


def test_too_large_a_body_by_its_length(live):
    answer = live.post("/v1/completions", None, content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_too_large_a_body_in_chunks(live):
    pieces = (b" " * 65536 for _ in range(MAX_BODY_BYTES // 65536 + 1))
    answer = live.post("/v1/completions", None, content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_as_large_as_allowed(live):
    body = json.dumps({"prompt": "The", "max_tokens": 1}).encode()
    body += b" " * (MAX_BODY_BYTES - len(body))
    assert live.post("/v1/completions", None, content=body, headers={"content-type": "application/json"}).status_code == 200


def test_a_large_body_is_refused_before_it_is_sent(live):
    with live.connect(http("/v1/completions", b"", f"Content-Length: {10**12}")) as connection:
        assert b"413" in connection.recv(4096).split(b"\r\n")[0]


def test_requests_are_counted_by_path_and_status(live):
    def counted(path, status):
        wanted = f'cadre_requests_total{{path="{path}",status="{status}"}} '
        lines = live.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))

    before = [counted("/v1/models", 200), counted("other", 404)]
    live.get("/v1/models")
    live.get("/v1/models/tiny")
    for name in "abc":
        live.get(f"/{name}")
    assert [counted("/v1/models", 200), counted("other", 404)] == [before[0] + 1, before[1] + 3]
    assert counted("/v1/models/{name:path}", 200) >= 1
    assert 'path="/a"' not in live.get("/metrics").text
