"""Transport against a scripted registry: tokens, TLS, proxies, options and messages."""

import json
import threading

import pytest

from imgsnap.errors import (
    AccessDenied,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from imgsnap.oci.auth import Scope
from imgsnap.oci.connections import ConnectionOptions, Proxies
from imgsnap.oci.http_errors import parse_refusal, redact, refusal_error
from imgsnap.oci.http_message import Request
from imgsnap.oci.locate import RegistryOptions
from tests.support.oci_images import repository_at, transport_to
from tests.support.registry import ScriptedRegistry
from tests.unit.oci.reading import BLOB, DATA, NAME, read

# Authentication


def test_token_flow_asks_once_per_scope(registry, auth_file):
    registry.switches.auth = "token"
    repository = repository_at(registry.host, NAME, auth_file=auth_file)
    for _ in range(3):
        assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    tokens = registry.requests(part="/token")
    assert [entry.query for entry in tokens] == [
        {"service": ["scripted"], "scope": [f"repository:{NAME}:pull"]}
    ]
    assert [entry.status for entry in registry.requests(part="/blobs/")] == [401, 206, 206, 206]
    repository.close()


def test_expired_tokens_are_renewed(registry, auth_file):
    registry.switches.auth = "token"
    registry.switches.token_uses = 2
    repository = repository_at(registry.host, NAME, auth_file=auth_file)
    for _ in range(7):
        assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    assert len(registry.requests(part="/token")) == 4
    repository.close()


def test_a_token_that_never_works_ends_denied(registry, auth_file):
    registry.switches.auth = "token"
    registry.switches.token_uses = 0
    with pytest.raises(AccessDenied, match="401") as caught:
        read(registry, auth_file=auth_file)
    assert "log in" in caught.value.hint
    assert len(registry.requests(part="/token")) == 1


def test_identity_tokens_are_posted(registry, tmp_path):
    registry.switches.auth = "token"
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"auths": {registry.host: {"identitytoken": "identity"}}}))
    assert read(registry, auth_file=path) == DATA[100:150]
    assert [entry.method for entry in registry.requests(part="/token")] == ["POST"]


def test_basic_auth_and_refusals(registry, auth_file):
    registry.switches.auth = "basic"
    assert read(registry, auth_file=auth_file) == DATA[100:150]
    with pytest.raises(AccessDenied, match="401 UNAUTHORIZED"):
        read(registry)
    registry.switches.auth = "token"
    with pytest.raises(AccessDenied, match="wrong password"):
        read(registry)


def test_many_threads_share_one_token(registry, auth_file):
    registry.switches.auth = "token"
    repository = repository_at(registry.host, NAME, auth_file=auth_file)
    repository.read_range(BLOB, 0, 1)
    results = []

    def work(number):
        for step in range(10):
            offset = (number * 37 + step * 11) % 9000
            results.append(repository.read_range(BLOB, offset, 64) == DATA[offset : offset + 64])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
    assert len(registry.requests(part="/token")) == 1
    repository.close()


def test_cookies_are_never_sent(registry):
    registry.switches.set_cookie = True
    repository = repository_at(registry.host, NAME)
    for _ in range(3):
        repository.read_range(BLOB, 0, 5)
    assert all("cookie" not in entry.headers for entry in registry.log)
    repository.close()


def test_warnings_are_logged_once(registry, caplog):
    registry.switches.warning = '299 - "this repository is going away"'
    repository = repository_at(registry.host, NAME)
    repository.read_range(BLOB, 0, 5)
    repository.read_range(BLOB, 0, 5)
    assert caplog.text.count("going away") == 1
    repository.close()


# TLS


def test_tls_with_a_given_authority(tls_files, tmp_path):
    from pathlib import Path

    with ScriptedRegistry(tls=tls_files) as registry:
        registry.add_blob(NAME, DATA)
        trusted = ConnectionOptions(ca_file=Path(tls_files[0]))
        assert read(registry, options=trusted) == DATA[100:150]
        assert read(registry, options=ConnectionOptions(insecure=True)) == DATA[100:150]
        environ = {"SSL_CERT_FILE": tls_files[0]}
        assert read(registry, options=ConnectionOptions(), environ=environ) == DATA[100:150]
        count = len(registry.log)
        with pytest.raises(Unavailable) as caught:
            read(registry, options=ConnectionOptions())
        assert "--ca-file" in caught.value.hint
        with pytest.raises(Unavailable) as caught:
            read(registry, options=ConnectionOptions(plain_http=True), attempts_max=1)
        assert len(registry.log) == count


def test_redirects_and_token_servers_do_not_leave_tls(tls_files, tmp_path):
    from pathlib import Path

    with ScriptedRegistry(tls=tls_files) as registry, ScriptedRegistry() as plain:
        registry.add_blob(NAME, DATA)
        options = ConnectionOptions(ca_file=Path(tls_files[0]))
        registry.switches.redirect_location = f"http://{plain.host}/x"
        with pytest.raises(AccessDenied, match="from https to"):
            read(registry, options=options)
        registry.switches.auth = "token"
        registry.switches.realm = f"http://{plain.host}/token"
        path = tmp_path / "c.json"
        path.write_text(json.dumps({"auths": {registry.host: {"auth": "dTpw"}}}))
        with pytest.raises(AccessDenied, match="plain HTTP"):
            read(registry, options=options, auth_file=path)
        assert plain.log == []


def test_loopback_falls_back_to_plain_http(registry):
    assert read(registry, options=ConnectionOptions()) == DATA[100:150]
    registry.switches.auth = "token"
    repository = repository_at(registry.host, NAME, options=ConnectionOptions())
    with pytest.raises(AccessDenied):
        repository.read_range(BLOB, 0, 5)
    assert repository.transport.origin == f"http://{registry.host}"
    repository.close()


def test_other_hosts_do_not_fall_back(registry, monkeypatch):
    monkeypatch.setattr("imgsnap.oci.transport.is_loopback", lambda host: False)
    with pytest.raises(Unavailable) as caught:
        read(registry, options=ConnectionOptions())
    assert "--plain-http" in caught.value.hint
    assert registry.log == []


# Options, proxies, messages


@pytest.mark.parametrize(
    "header", [("Cookie", "a=b"), ("Host", "x"), ("X", "a\r\nY: b"), ("X Y", "z"), ("Range", "x")]
)
def test_unsafe_headers_are_refused(header):
    with pytest.raises(InvalidArgument):
        ConnectionOptions(headers=(header,))


def test_a_missing_certificate_file_is_named(tmp_path):
    options = ConnectionOptions(ca_file=tmp_path / "none.pem")
    with pytest.raises(InvalidArgument, match=r"none\.pem"):
        transport_to("r.example", options=options).open(Request("GET", "/v2/"))
    with pytest.raises(InvalidArgument):
        RegistryOptions(key_file=tmp_path / "key").connection_options()


def test_proxies_are_chosen_as_curl_does():
    environ = {
        "HTTPS_PROXY": "http://p:1",
        "http_proxy": "p:2",
        "NO_PROXY": "a.example, .corp,10.0.0.0/8,b.example:5000,*.wild.example",
    }
    proxies = Proxies(environ)
    assert proxies.url_for("https", "r.example", None) == "http://p:1"
    assert proxies.url_for("http", "r.example", None) == "http://p:2"
    for host in ("a.example", "x.a.example", "y.corp", "10.1.2.3", "z.wild.example"):
        assert proxies.url_for("https", host, 443) is None
    assert proxies.url_for("https", "b.example", 5000) is None
    assert proxies.url_for("https", "b.example", 443) == "http://p:1"
    assert proxies.url_for("https", "127.0.0.1", 5000) is None
    assert proxies.url_for("https", "::1", 5000) is None
    assert Proxies({"HTTPS_PROXY": "p", "no_proxy": "*"}).url_for("https", "r", None) is None
    assert Proxies({}).url_for("https", "r", None) is None
    with pytest.raises(InvalidArgument):
        Proxies({"all_proxy": "socks5://p"}).url_for("https", "r", None)


def test_plain_http_goes_through_a_proxy(registry):
    # The scripted registry stands in for a proxy: it sees the absolute URL.
    environ = {"http_proxy": f"http://{registry.host}"}
    transport = transport_to("r.example", environ=environ)
    request = Request("GET", "/v2/", Scope())
    assert transport.exchange(request, lambda response: response.body(100)) == b"{}"
    assert registry.log[0].headers["host"] == "r.example"
    transport.close()


@pytest.mark.parametrize(
    ("status", "kind", "exit_code"),
    [(403, AccessDenied, 5), (404, NotFound, 4), (500, Unavailable, 6), (400, InvalidArgument, 2)],
)
def test_errors_keep_facts_and_hide_signatures(status, kind, exit_code):
    refusal = parse_refusal(status, b'{"errors":[{"code":"X","message":"a\\u001b[31mb"}]}')
    error = refusal_error(refusal, method="GET", url="https://u:p@h/x?sig=secret")
    assert isinstance(error, kind)
    assert error.exit_code == exit_code
    assert error.refusal.codes == ("X",)
    assert "secret" not in str(error)
    assert "u:p" not in str(error)
    assert "\x1b" not in str(error)


def test_odd_error_bodies_are_quoted_short():
    html = parse_refusal(502, b"<html><b>Bad</b> Gateway" + b"x" * 100_000)
    assert html.text.startswith("Bad Gateway")
    assert len(html.text) <= 300
    for body in (b"", b"[]", b'{"errors":5}', b'{"errors":[5]}', b"\xff\xff", b"[" * 50_000):
        assert parse_refusal(500, body).status == 500
    assert redact("https://h/p?a=b") == "https://h/p?…"


@pytest.mark.parametrize("auth", ["basic", "token"])
def test_a_helper_that_hands_out_a_new_secret_is_asked_again(registry, tmp_path, auth):
    secret = tmp_path / "secret"
    helper = tmp_path / "docker-credential-turn"
    helper.write_text(
        "#!/bin/sh\n"
        f'printf \'{{"Username":"{registry.username}","Secret":"%s"}}\' "$(cat {secret})"\n'
    )
    helper.chmod(0o755)
    config = tmp_path / "config.json"
    config.write_text('{"credsStore":"turn"}')
    registry.switches.auth, registry.switches.token_uses = auth, 1
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    repository = repository_at(registry.host, NAME, auth_file=config, environ=environ)
    for password in ("first", "second"):
        secret.write_text(password)
        registry.password = password
        for _ in range(2):
            assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    repository.close()


def test_closing_closes_every_connection(registry):
    repository = repository_at(registry.host, NAME)
    streams = [repository.open_range(BLOB, 0, 100) for _ in range(3)]
    for opened in [stream.__enter__() for stream in streams]:
        opened.read(100)
    for stream in streams:
        stream.__exit__(None, None, None)
    pools = repository.transport._connections.manager_for(f"http://{registry.host}").pools
    pool = pools[next(iter(pools.keys()))]
    kept = [connection for connection in pool.pool.queue if connection is not None]
    assert len(kept) == 3
    repository.close()
    assert all(connection.sock is None for connection in kept)
