"""hosts.toml: which file, what its keys mean, and what is said about mistakes."""

from pathlib import Path

import pytest

from imgsnap.errors import InvalidArgument
from imgsnap.oci.hosts import CAPABILITIES, find_hosts, parse_hosts

FULL = """
server = "https://registry-1.docker.io"

[host."https://mirror.example:5000/v2/proxy"]
  capabilities = ["pull", "resolve"]
  ca = ["one.pem", "/etc/two.pem"]
  client = [["/etc/client.cert", "client.key"], ["both.pem", ""]]
  skip_verify = true
  dial_timeout = "1m1.5s"
  proxy = "http://proxy.example:3128"
  [host."https://mirror.example:5000/v2/proxy".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."http://10.0.0.1:8080/api/images"]
  capabilities = ["pull"]
  override_path = true
  ca = "one.pem"
  client = "both.pem"

[host."plain.example"]
"""


def parsed(text: str, registry: str = "docker.io"):
    return parse_hosts(text.encode(), Path("/certs/here/hosts.toml"), registry).hosts


def test_every_key_is_understood():
    mirror, address, plain, server = parsed(FULL)
    assert (mirror.host, mirror.api) == ("mirror.example:5000", "/v2/proxy/v2")
    assert mirror.capabilities == {"pull", "resolve"}
    options = mirror.options
    assert options.more_ca_files == (Path("/certs/here/one.pem"), Path("/etc/two.pem"))
    assert options.client_pairs == (
        (Path("/etc/client.cert"), Path("/certs/here/client.key")),
        (Path("/certs/here/both.pem"), None),
    )
    assert options.insecure
    assert not options.plain_http
    assert options.connect_timeout_s == 61.5
    assert options.proxy == "http://proxy.example:3128"
    assert options.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert (address.host, address.api) == ("10.0.0.1:8080", "/api/images")
    assert address.options.plain_http
    assert address.options.client_pairs == ((Path("/certs/here/both.pem"), None),)
    assert (plain.host, plain.api, plain.capabilities) == ("plain.example", "/v2", CAPABILITIES)
    assert not plain.options.plain_http
    assert (server.host, server.api, server.capabilities) == (
        "registry-1.docker.io",
        "/v2",
        CAPABILITIES,
    )


def test_root_keys_are_the_servers():
    text = 'server = "http://a.example"\ncapabilities = ["pull"]\n[header]\nx-a = "b"\n'
    (server,) = parsed(text)
    assert server.capabilities == {"pull"}
    assert server.options.plain_http
    assert server.options.headers == (("x-a", "b"),)


def test_without_a_server_the_registry_itself_comes_last():
    assert [host.host for host in parsed('[host."https://m"]\n', "r.example:5000")] == [
        "m",
        "r.example:5000",
    ]
    (hub,) = parsed("", "docker.io")
    assert hub.host == "registry-1.docker.io"
    assert parsed("", "127.0.0.1:5000")[0].options.plain_http


def test_the_most_specific_directory_counts(tmp_path):
    def put(name, server):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts.toml").write_text(f'server = "https://{server}"\n')

    assert find_hosts(tmp_path, "r.example:5000") is None
    assert find_hosts(tmp_path / "none", "r.example:5000") is None
    for name, server in (
        ("_default", "any.example"),
        ("r.example:5000", "colon.example"),
        ("r.example_5000_", "under.example"),
    ):
        put(name, server)
        assert find_hosts(tmp_path, "r.example:5000").hosts[-1].host == server
    assert find_hosts(tmp_path, "other.example").hosts[-1].host == "any.example"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("server = 5", "server"),
        ('server = "ftp://x"', "server"),
        ('server = "https://"', "server"),
        ('server = "https://[::1"', "server"),
        ('server = "https://u:p@x"', "server"),
        ('server = "https://x/?a=b"', "server"),
        ("host = 1", "host"),
        ("[host]\nx = 1", 'host."x"'),
        ('[host."https://m"]\ncapabilities = ["fly"]', 'host."https://m".capabilities'),
        ('[host."https://m"]\ncapabilities = 3', 'host."https://m".capabilities'),
        ('[host."https://m"]\nca = [1]', 'host."https://m".ca'),
        ('[host."https://m"]\nca = ""', 'host."https://m".ca'),
        ('[host."https://m"]\nclient = [["a", "b", "c"]]', 'host."https://m".client'),
        ('[host."https://m"]\nclient = 1', 'host."https://m".client'),
        ('[host."https://m"]\nskip_verify = "yes"', 'host."https://m".skip_verify'),
        ('[host."https://m"]\noverride_path = 1', 'host."https://m".override_path'),
        ('[host."https://m"]\ndial_timeout = "soon"', 'host."https://m".dial_timeout'),
        ('[host."https://m"]\nproxy = "socks5://p"', 'host."https://m".proxy'),
        ('[host."https://m"]\n[host."https://m".header]\ncookie = "a"', 'host."https://m".header'),
        ('[host."https://m"]\n[host."https://m".header]\nx = 1', 'host."https://m".header.x'),
        ("server = ", "not TOML"),
        ("\n".join(f'[host."https://m{n}"]' for n in range(65)), "host"),
    ],
)
def test_mistakes_name_the_file_and_the_key(text, key):
    with pytest.raises(InvalidArgument) as caught:
        parsed(text)
    assert str(caught.value).startswith(f"/certs/here/hosts.toml: {key}: ")


def test_bytes_that_are_no_text_and_huge_files_are_refused():
    for raw in (b"\xff\xfe", b"#" * (2 << 20)):
        with pytest.raises(InvalidArgument, match=r"hosts\.toml"):
            parse_hosts(raw, Path("/certs/here/hosts.toml"), "r.example")
