"""Questions to this machine go to this machine, whatever HTTP_PROXY says."""

import pytest

from loadtests.service_side.http_client import http_client
from tests.support.scripted_server import Peer, ScriptedServer


def _answers(peer: Peer) -> None:
    peer.read()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_is_not_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(_answers) as service, ScriptedServer(_answers) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with http_client(timeout_seconds=5) as client:
            assert client.get(f"http://{host}:{service.port}/").text == "ok"
            assert not proxy.requests
            assert client.get("http://shop.example/").text == "ok"  # the proxy is set, and asked for others
    assert len(service.requests) == len(proxy.requests) == 1
