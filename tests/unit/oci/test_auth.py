"""Credentials files and helpers, challenges, tokens."""

import base64
import json
import os
import threading
from urllib.parse import parse_qs, urlsplit

import pytest

from imgsnap.errors import AccessDenied, FormatError
from imgsnap.oci.auth import (
    Authenticator,
    Challenge,
    Scope,
    parse_challenges,
    parse_token_answer,
    token_request,
)
from imgsnap.oci.credentials import CredentialHelperError, Credentials, CredentialSource


def auth(user="u", password="p:q"):
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def helper(directory, name, script):
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def test_files_are_tried_in_docker_and_podman_order(tmp_path):
    write(tmp_path / "home/.docker/config.json", {"auths": {"r.io": auth("docker")}})
    environ = {"HOME": str(tmp_path / "home")}
    assert CredentialSource(environ).lookup("r.io").username == "docker"
    write(tmp_path / "dc/config.json", {"auths": {"r.io": auth("dc")}})
    environ["DOCKER_CONFIG"] = str(tmp_path / "dc")
    assert CredentialSource(environ).lookup("r.io").username == "dc"
    write(tmp_path / "run/containers/auth.json", {"auths": {"r.io": auth("podman")}})
    environ["XDG_RUNTIME_DIR"] = str(tmp_path / "run")
    assert CredentialSource(environ).lookup("r.io").username == "podman"
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "a.json", {"auths": {"r.io": auth("a")}}))
    assert CredentialSource(environ).lookup("r.io").username == "a"
    given = write(tmp_path / "g.json", {"auths": {"r.io": auth("given", "p:q")}})
    assert CredentialSource(environ, given).lookup("r.io") == Credentials("given", "p:q")
    assert CredentialSource(environ, given).lookup("other.io") is None


def test_missing_and_empty_files_are_no_credentials(tmp_path):
    environ = {"REGISTRY_AUTH_FILE": str(write(tmp_path / "empty", ""))}
    assert CredentialSource(environ).lookup("r.io") is None
    assert CredentialSource({"HOME": str(tmp_path / "no")}).lookup("r.io") is None
    assert CredentialSource({}).lookup("r.io") is None
    with pytest.raises(AccessDenied):
        CredentialSource({}, tmp_path / "no.json").lookup("r.io")


@pytest.mark.parametrize(
    "key", ["docker.io", "https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io"]
)
def test_docker_hub_is_found_under_all_its_names(tmp_path, key):
    file = write(tmp_path / "c", {"auths": {key: auth("hub")}})
    assert CredentialSource({}, file).lookup("docker.io", "library/x").username == "hub"


def test_more_specific_logins_win(tmp_path):
    keys = {"r.io": auth("host"), "r.io/team": auth("team"), "https://s.io/v2/": auth("url")}
    source = CredentialSource({}, write(tmp_path / "c", {"auths": keys}))
    assert source.lookup("r.io", "team/app").username == "team"
    assert source.lookup("r.io", "other/app").username == "host"
    assert source.lookup("s.io", "x").username == "url"


def test_identity_tokens(tmp_path):
    file = write(tmp_path / "c", {"auths": {"r.io": {"identitytoken": "secret", "auth": ""}}})
    found = CredentialSource({}, file).lookup("r.io")
    assert found == Credentials(identity_token="secret")
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    "value", ["[1]", "{", {"auths": []}, {"auths": {"r.io": {"auth": "*"}}}, {"credHelpers": 3}]
)
def test_malformed_files_are_named(tmp_path, value):
    with pytest.raises(FormatError, match="config-file"):
        CredentialSource({}, write(tmp_path / "config-file", value)).lookup("r.io")


def test_helpers_get_the_server_on_stdin(tmp_path):
    environ = helper(
        tmp_path,
        "test",
        'read s; [ "$1" = get ] && echo "{\\"Username\\":\\"$s\\",\\"Secret\\":\\"x\\"}"',
    )
    per_host = write(tmp_path / "c", {"credHelpers": {"r.io": "test"}})
    assert CredentialSource(environ, per_host).lookup("r.io") == Credentials("r.io", "x")
    store = write(tmp_path / "s", {"credsStore": "test", "auths": {"docker.io": {}}})
    found = CredentialSource(environ, store).lookup("docker.io")
    assert found.username == "https://index.docker.io/v1/"


def test_helper_tokens_and_absent_credentials(tmp_path):
    answer = '{"ServerURL":"r.io","Username":"<token>","Secret":"idt"}'
    environ = helper(tmp_path, "tok", f"echo '{answer}'")
    file = write(tmp_path / "c", {"credHelpers": {"r.io": "tok"}})
    assert CredentialSource(environ, file).lookup("r.io") == Credentials(identity_token="idt")
    environ = helper(tmp_path, "none", "echo credentials not found in native keychain; exit 1")
    file = write(tmp_path / "n", {"credsStore": "none", "auths": {"r.io": auth("file")}})
    assert CredentialSource(environ, file).lookup("r.io").username == "file"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo locked >&2; exit 3", "exit 3: locked"),
        ("echo nonsense", "something other"),
        ('echo \'{"Username":1,"Secret":2}\'', "something other"),
        ("exec sleep 20", "no answer in 0.2 s"),
    ],
)
def test_failing_helpers_are_named(tmp_path, script, problem):
    environ = helper(tmp_path, "bad", script)
    file = write(tmp_path / "c", {"credHelpers": {"r.io": "bad"}})
    with pytest.raises(CredentialHelperError, match="docker-credential-bad") as caught:
        CredentialSource(environ, file, helper_timeout_s=0.2).lookup("r.io")
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "../evil", "", "a b", 3])
def test_helpers_that_cannot_be_run(tmp_path, name):
    file = write(tmp_path / "c", {"credsStore": name})
    source = CredentialSource({"PATH": str(tmp_path)}, file)
    if name == "":
        assert source.lookup("r.io") is None
        return
    with pytest.raises(CredentialHelperError):
        source.lookup("r.io")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"},
                )
            ],
        ),
        (
            'Basic realm="say \\"hi\\"", Bearer realm=x',
            [Challenge("basic", {"realm": 'say "hi"'}), Challenge("bearer", {"realm": "x"})],
        ),
        (
            "Negotiate, BASIC Realm=x",
            [Challenge("negotiate"), Challenge("basic", {"realm": "x"})],
        ),
        ('Bearer realm="unclosed', [Challenge("bearer")]),
        ("", []),
        ("=,=,", []),
        ("Basic", [Challenge("basic")]),
    ],
)
def test_challenges(header, expected):
    assert parse_challenges(header) == expected


def test_token_requests():
    challenge = Challenge("bearer", {"realm": "https://a/t?x=1", "service": "s s"})
    scope = Scope.push("a/b") | Scope.pull("c")
    plain = token_request(challenge, scope, None)
    assert plain.form is None
    assert parse_qs(urlsplit(plain.url).query) == {
        "x": ["1"],
        "service": ["s s"],
        "scope": ["repository:a/b:pull,push", "repository:c:pull"],
    }
    basic = token_request(challenge, scope, Credentials("u", "p"))
    assert basic.headers["Authorization"] == "Basic dTpw"
    identity = token_request(challenge, scope, Credentials(identity_token="i"))
    form = parse_qs(identity.form.decode())
    assert form["grant_type"] == ["refresh_token"]
    assert form["refresh_token"] == ["i"]
    assert "u:p" not in repr(basic) + repr(identity)


@pytest.mark.parametrize("realm", ["file:///etc/passwd", "ftp://x/", "//x", "https://u:p@x/"])
def test_realms_must_be_http_urls(realm):
    with pytest.raises(AccessDenied):
        token_request(Challenge("bearer", {"realm": realm}), Scope(), None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"token": "t"}, ("t", 60.0)),
        ({"access_token": "t", "expires_in": 300}, ("t", 300.0)),
        ({"token": "t", "expires_in": -5}, ("t", 60.0)),
        ({"token": "t", "expires_in": "soon"}, ("t", 60.0)),
        ({"token": "t", "expires_in": 10**12}, ("t", 86400.0)),
    ],
)
def test_token_answers(answer, expected):
    assert parse_token_answer(json.dumps(answer).encode(), realm="https://a/t?x") == expected


@pytest.mark.parametrize("token", [None, "", 5, "a\r\nX: y", "ü"])
def test_tokens_that_could_not_be_sent_are_refused(token):
    with pytest.raises(FormatError):
        parse_token_answer(json.dumps({"token": token}).encode(), realm="https://a/t")


class Source:
    def lookup(self, registry, repository=""):
        return Credentials("u", "p")


def authenticator(now):
    made = []

    def fetch(request):
        made.append(request.url)
        return json.dumps({"token": f"t{len(made)}", "expires_in": 100}).encode()

    return Authenticator(Source(), clock=lambda: now[0]), made, fetch


BEARER = 'Bearer realm="https://a/t",service="s"'


def test_tokens_are_cached_per_scope_and_renewed_at_three_quarters():
    now = [0.0]
    subject, made, fetch = authenticator(now)
    pull, push = Scope.pull("a"), Scope.push("a")
    assert subject.header("r", pull, fetch) is None
    assert subject.answer("r", pull, BEARER, None, fetch) == "Bearer t1"
    assert subject.header("r", pull, fetch) == "Bearer t1"
    assert subject.header("r", push, fetch) == "Bearer t2"  # without another 401
    now[0] = 74.9
    assert subject.header("r", pull, fetch) == "Bearer t1"
    now[0] = 75.0
    assert subject.header("r", pull, fetch) == "Bearer t3"
    assert subject.header("other", pull, fetch) is None
    assert len(made) == 3


def test_threads_that_met_the_same_dead_token_renew_it_once():
    subject, made, fetch = authenticator([0.0])
    scope = Scope.pull("a")
    used = subject.answer("r", scope, BEARER, None, fetch)
    barrier = threading.Barrier(8)
    got = []

    def work():
        barrier.wait()
        got.append(subject.answer("r", scope, BEARER, used, fetch))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["Bearer t2"] * 8
    assert len(made) == 2


def test_basic_is_tried_once():
    subject, _, fetch = authenticator([0.0])
    scope = Scope.pull("a")
    header = subject.answer("r", scope, 'Basic realm="x"', None, fetch)
    assert header == "Basic dTpw"
    assert subject.header("r", scope, fetch) == header
    assert subject.answer("r", scope, 'Basic realm="x"', header, fetch) is None
    assert subject.answer("r", scope, "Negotiate", None, fetch) is None
