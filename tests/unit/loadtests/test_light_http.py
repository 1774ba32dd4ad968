"""The light HTTP client against servers that do it right, slowly, in pieces, wrongly, or not at all.

gevent patches nothing here: the servers are threads with ordinary sockets, the client's sockets are gevent's own.
"""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from loadtests.users import light_http
from loadtests.users.light_http import BadAnswer, ConnectionBroken, LightHttp, NotConnected, TimedOut
from tests.support.scripted_server import Peer, Script, ScriptedServer

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Name: value\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;extension=1\r\nhel\r\n2\r\nlo\r\n0\r\nX-Trailer: ignored\r\n\r\n"
)


@pytest.fixture
def http() -> Iterator[list[LightHttp]]:
    """Clients to be closed at the end."""
    clients: list[LightHttp] = []
    yield clients
    for client in clients:
        client.close()


def always(answer: bytes) -> Script:
    """Give every request the same answer."""

    def script(peer: Peer) -> None:
        while True:
            peer.read()
            peer.send(answer)

    return script


def once(*parts: bytes) -> Script:
    """Answer one request, in pieces that arrive one after the other, and close."""

    def script(peer: Peer) -> None:
        peer.read()
        for part in parts:
            peer.send(part)
            pause()

    return script


def pause() -> None:
    """Let what was sent arrive by itself."""
    threading.Event().wait(0.001)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(HELLO, id="content-length"),
        pytest.param(CHUNKED, id="chunked"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nhello", id="until-close"),
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", id="http-1.0"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO, id="100-before"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nX-Name: early\r\n\r\n" + CHUNKED, id="103-before"),
    ],
)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "byte-by-byte"])
def test_an_answer_is_read_to_its_end(answer: bytes, split: bool, http: list[LightHttp]) -> None:  # noqa: FBT001
    """However an answer is framed and cut into packets, its status and body are the same."""
    parts = [answer[at : at + 1] for at in range(len(answer))] if split else [answer]
    with ScriptedServer(once(*parts)) as server:
        http.append(LightHttp(server.url))
        found = http[0].request("GET", "/")
    assert (found.status, found.body) == (200, b"hello")


def test_headers_are_found_by_lower_case_name(http: list[LightHttp]) -> None:
    """Header names have no case, and those of a 1xx are not the answer's."""
    with ScriptedServer(always(b"HTTP/1.1 103 Early Hints\r\nX-Early: 1\r\n\r\n" + HELLO)) as server:
        http.append(LightHttp(server.url))
        assert http[0].request("GET", "/").headers == {b"content-length": b"5", b"x-name": b"value"}


@pytest.mark.parametrize(
    "answer",
    [HELLO, CHUNKED, b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n"],
    ids=["content-length", "chunked", "204", "304"],
)
def test_a_connection_is_kept(answer: bytes, http: list[LightHttp]) -> None:
    """Requests follow each other on one connection."""
    with ScriptedServer(always(answer)) as server:
        http.append(LightHttp(server.url))
        for _ in range(3):
            http[0].request("GET", "/")
        assert (server.connections, len(server.requests)) == (1, 3)


def test_connection_close_is_obeyed(http: list[LightHttp]) -> None:
    """After `Connection: close` the next request has a connection of its own, though the server has not closed."""
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    with ScriptedServer(always(answer)) as server:
        http.append(LightHttp(server.url))
        for _ in range(3):
            http[0].request("GET", "/")
        assert (server.connections, len(server.requests)) == (3, 3)


def test_a_request_goes_over_the_wire_as_it_was_asked_for(http: list[LightHttp]) -> None:
    """Method, prefixed path, common and own headers, length and body arrive."""
    with ScriptedServer(always(HELLO)) as server:
        http.append(LightHttp(f"{server.url}/shop/", headers={"Authorization": "Bearer key"}))
        http[0].request("POST", "/orders?x=1", headers={"X-Own": "1"}, body=b"{}")
        http[0].request("POST", "/orders/1/cancel")
    assert server.requests == [
        f"POST /shop/orders?x=1 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer key\r\n"
        "X-Own: 1\r\nContent-Length: 2\r\n\r\n{}".encode(),
        f"POST /shop/orders/1/cancel HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer key\r\n"
        "Content-Length: 0\r\n\r\n".encode(),
    ]


def test_a_connection_closed_while_idle_is_replaced(http: list[LightHttp]) -> None:
    """A server that closes an idle connection costs no request, and sees none twice."""
    closed = threading.Event()

    def answer_and_close(peer: Peer) -> None:
        peer.read()
        peer.send(HELLO)
        peer.close()
        closed.set()

    with ScriptedServer(answer_and_close, always(HELLO)) as server:
        http.append(LightHttp(server.url))
        http[0].request("GET", "/1")
        assert closed.wait(5)
        assert http[0].request("GET", "/2").body == b"hello"
        assert [request.split()[1] for request in server.requests] == [b"/1", b"/2"]
        assert server.connections == 2


@pytest.mark.parametrize("together", [True, False], ids=["with-the-answer", "while-idle"])
def test_an_answer_nobody_asked_for_is_not_taken_for_the_next(together: bool, http: list[LightHttp]) -> None:  # noqa: FBT001
    """An answer that nobody asked for costs the connection, and is taken for no other."""
    surplus = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"
    answered, said = threading.Event(), threading.Event()

    def speak_unasked(peer: Peer) -> None:
        peer.read()
        if together:
            peer.send(HELLO + surplus)
        else:
            peer.send(HELLO)
            answered.wait(5)
            peer.send(surplus)
        said.set()
        peer.wait_for_close()

    with ScriptedServer(speak_unasked, always(HELLO)) as server:
        http.append(LightHttp(server.url))
        assert http[0].request("GET", "/").status == 200
        answered.set()
        assert said.wait(5)
        assert http[0].request("GET", "/").status == 200
        assert server.connections == 2


def _reset(peer: Peer) -> None:
    peer.read()
    peer.reset()


def _reset_in_the_body(peer: Peer) -> None:
    peer.read()
    peer.send(HELLO[:-2])
    pause()
    peer.reset()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(_reset, id="reset"),
        pytest.param(_reset_in_the_body, id="reset-in-the-body"),
        pytest.param(once(), id="closed-without-a-word"),
        pytest.param(once(b"HTTP/1.1 200 OK\r\nConte"), id="closed-in-the-head"),
        pytest.param(once(HELLO[:-2]), id="closed-in-the-body"),
        pytest.param(once(CHUNKED[:-20]), id="closed-in-a-chunk"),
        pytest.param(once(b"HTTP/1.1 100 Continue\r\n\r\n"), id="closed-after-100"),
    ],
)
def test_a_request_that_was_sent_is_not_sent_again(script: Script, http: list[LightHttp]) -> None:
    """A connection that ends before the answer does is reported, and the server saw the request once."""
    with ScriptedServer(script, always(HELLO)) as server:
        http.append(LightHttp(server.url))
        with pytest.raises(ConnectionBroken):
            http[0].request("POST", "/orders", body=b"{}")
        assert (server.connections, len(server.requests)) == (1, 1)
        assert http[0].request("GET", "/").status == 200
        assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", id="another-protocol"),
        pytest.param(b"HTTP/1.1 abc OK\r\n\r\n", id="no-status"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", id="two-lengths"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="length-and-chunks",
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", id="no-chunk-size"),
        pytest.param(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", id="upgrade"
        ),
    ],
)
def test_what_is_not_http_is_a_bad_answer(garbage: bytes, http: list[LightHttp]) -> None:
    """Garbage is reported as such, and the next request has a fresh connection."""
    with ScriptedServer(once(garbage), always(HELLO)) as server:
        http.append(LightHttp(server.url))
        with pytest.raises(BadAnswer):
            http[0].request("GET", "/")
        assert http[0].request("GET", "/").body == b"hello"


def test_an_answer_that_never_comes_times_out(http: list[LightHttp]) -> None:
    """The wait is bounded, and the late answer is not taken for the next request's."""

    def say_nothing(peer: Peer) -> None:
        peer.read()
        peer.wait_for_close()

    with ScriptedServer(say_nothing, always(HELLO)) as server:
        http.append(LightHttp(server.url, timeout_seconds=0.1))
        with pytest.raises(TimedOut, match=r"no whole answer within 0\.1 s"):
            http[0].request("GET", "/")
        http[0] = LightHttp(server.url)
        assert http[0].request("GET", "/").body == b"hello"


def test_an_answer_that_trickles_times_out(http: list[LightHttp]) -> None:
    """The time is that of the whole answer, not of each packet."""

    def trickle(peer: Peer) -> None:
        peer.read()
        peer.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            peer.send(b"X-More: 1\r\n")
            threading.Event().wait(0.02)

    with ScriptedServer(trickle) as server:
        http.append(LightHttp(server.url, timeout_seconds=0.2))
        with pytest.raises(TimedOut):
            http[0].request("GET", "/")


def test_the_time_of_earlier_answers_does_not_count(http: list[LightHttp]) -> None:
    """Every request has the whole time, however long those before it waited together."""

    def think(peer: Peer) -> None:
        while True:
            peer.read()
            threading.Event().wait(0.25)
            peer.send(HELLO)

    with ScriptedServer(think) as server:
        http.append(LightHttp(server.url, timeout_seconds=1))
        assert [http[0].request("GET", "/").status for _ in range(6)] == [200] * 6


def test_nobody_listens(http: list[LightHttp]) -> None:
    """A refused connection says that nothing was sent."""
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        port = closed_at_once.getsockname()[1]
    http.append(LightHttp(f"http://127.0.0.1:{port}"))
    with pytest.raises(NotConnected, match="refused"):
        http[0].request("GET", "/")


def test_a_name_that_cannot_be_one(http: list[LightHttp]) -> None:
    """A host that cannot exist says that nothing was sent."""
    http.append(LightHttp(f"http://{'a' * 70}.test"))
    with pytest.raises(NotConnected):
        http[0].request("GET", "/")


def test_connecting_takes_too_long(http: list[LightHttp]) -> None:
    """A host that does not answer the handshake is given up in time, and nothing was sent."""
    with socket.socket() as listener, socket.socket() as filler, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)  # Linux drops the handshakes that do not fit the queue any more
        for each in (filler, second):
            each.settimeout(0)
            each.connect_ex(listener.getsockname())
        http.append(LightHttp(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_seconds=0.1))
        with pytest.raises(NotConnected, match=r"no connection within 0\.1 s"):
            http[0].request("GET", "/")


def test_a_second_address_is_tried(http: list[LightHttp], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an address where nobody listens and one where somebody does is reachable."""
    with ScriptedServer(always(HELLO)) as server, socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        nobody = closed_at_once.getsockname()
        closed_at_once.close()
        known = [(socket.AF_INET, nobody), (socket.AF_INET, ("127.0.0.1", server.port))]
        monkeypatch.setattr(light_http._names, "addresses", lambda *_: known)
        http.append(LightHttp(server.url))
        assert http[0].request("GET", "/").body == b"hello"


def test_a_name_is_looked_up_once_for_all_users(
    http: list[LightHttp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that are opened together share one lookup."""
    lookups: list[object] = []
    look_up = gevent.socket.getaddrinfo

    def count(*arguments: object, **options: object) -> object:
        lookups.append(arguments)
        return look_up(*arguments, **options)

    monkeypatch.setattr(gevent.socket, "getaddrinfo", count)
    with ScriptedServer(always(HELLO)) as server:
        http.extend(LightHttp(server.url) for _ in range(20))
        gevent.joinall([gevent.spawn(client.request, "GET", "/") for client in http], raise_error=True)
        assert (server.connections, len(lookups)) == (20, 1)


def test_ipv6(http: list[LightHttp]) -> None:
    """An IPv6 address is reached, and stands in brackets in Host."""
    try:
        server = ScriptedServer(always(HELLO), host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        http.append(LightHttp(f"http://[::1]:{server.port}"))
        assert http[0].request("GET", "/").body == b"hello"
        assert f"\r\nHost: [::1]:{server.port}\r\n".encode() in server.requests[0]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate for localhost, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path / "localhost.pem"
    command = (
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    )
    command += f" -addext subjectAltName=DNS:localhost -keyout {path} -out {path}.crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "unknown-certificate"])
def test_https(
    trusted: bool,  # noqa: FBT001
    certificate: Path,
    http: list[LightHttp],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HTTPS works over a kept connection where the certificate is trusted; otherwise nothing is sent."""
    light_http._tls.cache_clear()
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ScriptedServer(always(CHUNKED), tls=context) as server:
        http.append(LightHttp(f"https://localhost:{server.port}"))
        if trusted:
            assert [http[0].request("GET", "/").body for _ in range(3)] == [b"hello"] * 3
            assert server.connections == 1
        else:
            with pytest.raises(NotConnected, match="CERTIFICATE_VERIFY_FAILED"):
                http[0].request("GET", "/")
            assert server.requests == []
    light_http._tls.cache_clear()


def test_a_user_who_is_stopped_hangs_up(http: list[LightHttp]) -> None:
    """Killing a waiting user closes its connection, so that no later answer is taken for another's."""
    asked, hung_up = threading.Event(), threading.Event()

    def wait(peer: Peer) -> None:
        peer.read()
        asked.set()
        peer.wait_for_close()
        hung_up.set()

    with ScriptedServer(wait) as server:
        http.append(LightHttp(server.url))
        user = gevent.spawn(http[0].request, "GET", "/")
        while not asked.is_set():
            gevent.sleep(0.001)
        user.kill()
        assert hung_up.wait(5)


def test_many_users_share_a_process(http: list[LightHttp]) -> None:
    """Users on one event loop wait beside each other, and each gets the answer to its own request."""
    barrier = threading.Barrier(20, timeout=10)

    def echo_path(peer: Peer) -> None:
        while True:
            path = peer.read().split()[1]
            barrier.wait()  # nobody is answered before all have asked
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

    with ScriptedServer(echo_path) as server:
        http.extend(LightHttp(server.url) for _ in range(20))

        def ask(number: int) -> list[bytes]:
            return [http[number].request("GET", f"/{number}-{turn}").body for turn in range(3)]

        users = [gevent.spawn(ask, number) for number in range(20)]
        gevent.joinall(users, raise_error=True)
        assert [user.value for user in users] == [
            [f"/{number}-{turn}".encode() for turn in range(3)] for number in range(20)
        ]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://localhost", "http://", "http://user:secret@localhost", ""]
)
def test_a_bad_base_url_is_refused(url: str) -> None:
    """A target that is not a base URL is refused at once."""
    with pytest.raises(ValueError, match="not a base URL"):
        LightHttp(url)


def test_a_line_break_cannot_add_a_header() -> None:
    """Neither a path nor a header can bring another header along."""
    client = LightHttp("http://localhost")
    with pytest.raises(ValueError, match="line break"):
        client.head("GET", "/\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="line break"):
        client.head("GET", "/", {"Authorization": "a\nX-Evil: 1"})


def test_nothing_is_patched() -> None:
    """Importing the client leaves the process's sockets alone."""
    assert not gevent.monkey.is_module_patched("socket")
