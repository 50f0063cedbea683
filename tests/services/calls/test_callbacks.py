"""What a callback address may be."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.errors import FleetError
from fleet_server.services.callbacks import CallbackRules, allow_rules, check_callback, refusal_of, without_query

STRICT = CallbackRules()
LOCAL = CallbackRules(loopback=True, own_ports=frozenset({8765, 50051}))
LAN = CallbackRules(allowed=(ipaddress.ip_network("192.168.0.0/16"), ipaddress.ip_network("fd00::/8")))


def verdict(url: str, rules: CallbackRules = STRICT) -> str:
    try:
        check_callback(url, rules)
    except FleetError as error:
        assert error.violations[0].field == "callback_url"
        assert error.detail.startswith("callback_url: ")
        return error.reason
    return "ok"


@pytest.mark.parametrize(
    "url",
    [
        "https://your-app.com/webhook",
        "http://example.com:8080/a?b=c#d",
        "https://93.184.216.34/x",
        "https://[2606:4700::1111]/x",
        "http://xn--bcher-kva.example/",
        "http://under_score.example",
        "HTTPS://EXAMPLE.COM",
        "http://example.com./",
    ],
)
def test_plain_addresses_pass(url: str) -> None:
    assert verdict(url) == "ok"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com",
        "javascript:alert(1)",
        "//example.com",
        "example.com",
        "http://",
        "http:///path",
        "https://user@example.com",
        "https://user:word@example.com",
        "https://@example.com",
        "http://example.com:0",
        "http://example.com:65536",
        "http://example.com:x",
        "http://exa mple.com",
        "http://example.com/\n",
        "http://example.com\\@127.0.0.1",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://bücher.example",
        "http://-x.example",
        "http://1.2.3.4.5",
        "http://256.1.1.1",
        "http://a..b",
        "http://" + "a" * 64 + ".example",
    ],
)
def test_what_is_no_plain_address_is_a_bad_field(url: str) -> None:
    assert verdict(url, LOCAL) == "INVALID_FIELD"


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://169.254.1.1",
        "http://0.0.0.0",
        "http://0.1.2.3",
        "http://224.0.0.1",
        "http://255.255.255.255",
        "http://240.0.0.1",
        "http://100.100.100.200",
        "http://[fe80::1]/",
        "http://[::]/",
        "http://[ff02::1]/",
        "http://[fd00:ec2::254]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[2002:a9fe:a9fe::]/",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://0251.0376.0251.0376",
        "http://169.254.43518",
    ],
)
def test_link_local_and_metadata_never_pass(url: str) -> None:
    every = CallbackRules(True, frozenset(), (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")))
    assert verdict(url) == verdict(url, every) == "CALLBACK_FORBIDDEN"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "127.0.0.1.",
        "localhost",
        "LOCALHOST.",
        "a.localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
    ],
)
def test_the_own_machine_passes_where_it_may_but_for_our_ports(host: str) -> None:
    assert verdict(f"http://{host}:9000/x") == "CALLBACK_FORBIDDEN"
    assert verdict(f"http://{host}:9000/x", LOCAL) == "ok"
    assert verdict(f"http://{host}:8765/x", LOCAL) == "CALLBACK_FORBIDDEN"


def test_a_default_port_can_be_ours_too() -> None:
    rules = CallbackRules(loopback=True, own_ports=frozenset({443}))
    assert verdict("https://localhost/", rules) == "CALLBACK_FORBIDDEN"
    assert verdict("http://localhost/", rules) == "ok"


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1", "192.168.1.214", "172.16.0.1", "100.64.0.1", "[fd12::1]", "[::ffff:192.168.1.1]", "192.168.257"],
)
def test_private_networks_pass_only_where_named(host: str) -> None:
    assert verdict(f"http://{host}/") == verdict(f"http://{host}/", LOCAL) == "CALLBACK_FORBIDDEN"
    named = "192.168" in host or "fd12" in host
    assert verdict(f"http://{host}/", LAN) == ("ok" if named else "CALLBACK_FORBIDDEN")


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "http://["]))
def test_no_text_does_anything_but_pass_or_be_refused(text: str, prefix: str) -> None:
    assert verdict(prefix + text) in {"ok", "INVALID_FIELD", "CALLBACK_FORBIDDEN"}


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_all_its_spellings(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    octal = ".".join(f"0{part:o}" for part in address.packed)
    spellings = [str(address), str(number), hex(number), octal, f"[::ffff:{address}]"]
    assert len({verdict(f"http://{spelling}/", LAN) for spelling in spellings}) == 1


def test_query_strings_are_not_shown() -> None:
    assert without_query("https://a.example/b?token=c#d") == "https://a.example/b"
    assert without_query("https://a.example/b#d") == "https://a.example/b"


@pytest.mark.parametrize("port", [22, 25, 6000, 6379, 10080])
def test_ports_of_other_protocols_are_refused_wherever_they_are(port: int) -> None:
    assert verdict(f"http://93.184.216.34:{port}/") == "CALLBACK_FORBIDDEN"
    assert verdict(f"http://localhost:{port}/", LOCAL) == "CALLBACK_FORBIDDEN"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "192.168.7.7", "[::ffff:192.168.7.7]"])
def test_our_own_ports_are_refused_whatever_is_allowed(host: str) -> None:
    everything = CallbackRules(
        loopback=True,
        own_ports={8765},
        allowed=(ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")),
        own_addresses={ipaddress.ip_address("192.168.7.7")},
    )
    assert verdict(f"http://{host}:8765/", everything) == "CALLBACK_FORBIDDEN"
    assert verdict(f"http://{host}:8766/", everything) == "ok"


def test_a_port_that_becomes_ours_is_refused_from_then_on() -> None:
    ports: set[int] = set()
    rules = CallbackRules(loopback=True, own_ports=ports)
    assert verdict("http://localhost:8765/", rules) == "ok"
    ports.add(8765)
    assert verdict("http://localhost:8765/", rules) == "CALLBACK_FORBIDDEN"


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (["public"], {"93.184.216.34"}),
        (["public", "loopback"], {"93.184.216.34", "127.0.0.1"}),
        (["10.0.0.0/8"], {"10.1.2.3"}),
        (["10.1.2.3", "fd12::/16"], {"10.1.2.3", "fd12::1"}),
        (["127.0.0.0/8"], {"127.0.0.1"}),
        ([], set()),
        (["169.254.0.0/16", "0.0.0.0/0"], {"93.184.216.34", "127.0.0.1", "10.1.2.3"}),
    ],
)
def test_the_list_says_all_that_may_be_called(words: list[str], passes: set[str]) -> None:
    tried = ["93.184.216.34", "127.0.0.1", "10.1.2.3", "fd12::1", "169.254.169.254", "64:ff9b:1::1"]
    rules = allow_rules(words)
    assert {text for text in tried if refusal_of(ipaddress.ip_address(text), 443, rules) is None} == passes


@pytest.mark.parametrize("word", ["private", "10.0.0.0/40", "10.1.2.3/8", "example.com", ""])
def test_an_unknown_word_of_the_list_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="use public, loopback, addresses and networks"):
        allow_rules([word])


@pytest.mark.parametrize("text", ["64:ff9b::a00:1", "2002:a00:1::", "::ffff:0:a00:1", "::a00:1", "::ffff:10.0.0.1"])
def test_addresses_inside_others_are_judged(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert refusal_of(address, 443, STRICT) is not None
    assert refusal_of(address, 443, CallbackRules(allowed=(ipaddress.ip_network("10.0.0.0/8"),))) is None
