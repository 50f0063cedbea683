"""When a callback is tried again, its ids, its signatures, and whose secret signs."""

from __future__ import annotations

import base64
import uuid
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from fleet_server.domain.webhook import (
    SCHEDULE_SECONDS,
    Answer,
    DeliveryState,
    RetryPlan,
    Verdict,
    delivery_id,
    generation_of,
    judge,
    retry_after_ms,
    split_webhook_id,
    webhook_id,
)
from fleet_server.domain.webhook_signature import (
    Secret,
    SecretBook,
    SecretError,
    parse_endpoints,
    parse_secrets,
    signature_header,
)
from tests.webhooks.works import now_ms

PLAN = RetryPlan(jitter=0.1)
LONG = base64.b64encode(b"k" * 24).decode()


def test_the_schedule_is_the_standards() -> None:
    assert [f"{seconds:g}" for seconds in SCHEDULE_SECONDS[:6]] == ["5", "300", "1800", "7200", "18000", "36000"]
    waits = [judge(Answer(500, ""), tries, PLAN, 0.0).wait_ms for tries in range(1, 11)]
    assert waits == [*(int(seconds * 1000) for seconds in SCHEDULE_SECONDS), None]
    assert judge(Answer(500, ""), 10, PLAN, 0.0) == Verdict(DeliveryState.FAILED)


def test_jitter_only_adds() -> None:
    assert judge(Answer(None, ""), 2, PLAN, 1.0).wait_ms == 330_000


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_every_2xx_is_a_delivery(status: int) -> None:
    assert judge(Answer(status, ""), 1, PLAN, 0.5) == Verdict(DeliveryState.DELIVERED)


@pytest.mark.parametrize("status", [None, 100, 301, 302, 307, 400, 404, 418, 429, 500, 503, 599])
def test_everything_else_is_tried_again(status: int | None) -> None:
    assert judge(Answer(status, ""), 1, PLAN, 0.0) == Verdict(DeliveryState.PENDING, 5_000)


def test_gone_is_the_end() -> None:
    assert judge(Answer(410, "", retry_after_ms=5), 1, PLAN, 0.0) == Verdict(DeliveryState.FAILED)


@pytest.mark.parametrize(
    ("status", "asked", "wait"),
    [(429, 60_000, 60_000), (503, 60_000, 60_000), (503, 1, 5_000), (500, 60_000, 5_000), (429, 10**12, 86_400_000)],
)
def test_retry_after_counts_where_it_means_something_and_up_to_a_day(status: int, asked: int, wait: int) -> None:
    assert judge(Answer(status, "", retry_after_ms=asked), 1, PLAN, 0.0).wait_ms == wait


def test_retry_after_is_seconds_or_a_date() -> None:
    now = now_ms()
    assert retry_after_ms(" 120 ", now) == 120_000
    assert 58_000 < (retry_after_ms(formatdate(now / 1000 + 60, usegmt=True), now) or 0) <= 60_000
    assert retry_after_ms("Sun, 06 Nov 1994 08:49:37 GMT", now) == 0
    for text in ("", "-5", "soon", "1.5", "9" * 10, "\x00", "Sun, 99 Nov 1994 08:49:37 GMT"):
        assert retry_after_ms(text, now) is None


@given(st.text(max_size=40))
def test_no_retry_after_does_harm(text: str) -> None:
    found = retry_after_ms(text, 0)
    assert found is None or found >= 0


@given(st.text(min_size=1, max_size=40), st.integers(1, 2**31 - 1))
def test_webhook_ids_are_whole(job_id: str, generation: int) -> None:
    assert split_webhook_id(webhook_id(job_id, generation)) == (job_id, generation)


@given(st.text(min_size=1, max_size=40), st.integers(1, 2**31 - 1), st.integers(0, 2**47))
def test_delivery_ids_are_uuids_that_know_their_generation(job_id: str, generation: int, at: int) -> None:
    made = delivery_id(job_id, generation, at)
    assert str(uuid.UUID(made)) == made
    assert (uuid.UUID(made).version, uuid.UUID(made).variant) == (7, uuid.RFC_4122)
    assert uuid.UUID(made).int >> 80 == at
    assert generation_of(made) == generation


@pytest.mark.parametrize("text", ["", "x", "0198f2c5-01aa-7c3b-9d52-000000000000", "0198f2c501aa7c3b9d52000000000001"])
def test_what_is_no_delivery_id_has_no_generation(text: str) -> None:
    assert generation_of(text) is None


@given(st.binary(min_size=24, max_size=64), st.text(max_size=50).filter(lambda text: text.isascii()))
def test_the_standards_library_agrees_with_our_signatures(key: bytes, body: str) -> None:
    secret = Secret(key)
    at = now_ms() // 1000
    headers = {
        "webhook-id": "job.1",
        "webhook-timestamp": str(at),
        "webhook-signature": signature_header((Secret(b"another" * 4), secret), "job.1", at, body.encode()),
    }
    Webhook(secret.text).verify(body, headers, json_parse=False)
    assert Secret.parse(secret.text) == secret


def test_a_secret_never_shows() -> None:
    book = SecretBook(parse_secrets(f"whsec_{LONG}"), parse_endpoints(f"https://a.example whsec_{LONG}"))
    assert LONG not in repr(book)
    assert "kkkk" not in repr(book)


@pytest.mark.parametrize(
    "text",
    ["", LONG, "whsec_", "whsec_!!!!", f"whsec_{base64.b64encode(b'k' * 23).decode()}",
     f"whsec_{base64.b64encode(b'k' * 65).decode()}", f"whsec_{LONG} nonsense-{LONG}"],
)  # fmt: skip
def test_a_bad_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SecretError) as caught:
        parse_secrets(text)
    assert LONG not in str(caught.value)


BOOK = SecretBook(
    (Secret(b"d" * 24),),
    parse_endpoints(
        "# receivers\n\n"
        + "\n".join(
            f"{address}  whsec_{base64.b64encode(letter.encode() * 24).decode()}"
            for address, letter in [
                ("https://a.example", "a"), ("https://a.example/b", "b"), ("https://a.example/b/c/", "c"),
                ("http://a.example", "h"), ("https://a.example:8443", "p"), ("https://[2001:db8::1]/x", "6"),
            ]
        )
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("url", "letter"),
    [
        ("https://a.example", "a"),
        ("https://A.Example./", "a"),
        ("https://a.example:443/bb?x=/b/c", "a"),
        ("https://a.example/b", "b"),
        ("https://a.example/b/?q", "b"),
        ("https://a.example/b/c", "c"),
        ("https://a.example/b/c/d", "c"),
        ("https://a.example/b/cc", "b"),
        ("http://a.example/b", "h"),
        ("https://a.example:8443/b", "p"),
        ("https://[2001:db8::1]/x/y", "6"),
        ("https://a.example.evil.com/b", "d"),
        ("https://xa.example/b", "d"),
        ("https://a.example:444/b", "d"),
    ],
)
def test_the_longest_address_says_which_secret_signs(url: str, letter: str) -> None:
    assert [secret.key for secret in BOOK.for_url(url)] == [letter.encode() * 24]


@pytest.mark.parametrize(
    "line",
    ["https://a.example", f"a.example whsec_{LONG}", f"https://u@a.example whsec_{LONG}", f"ftp://a whsec_{LONG}",
     f"https://a.example?x whsec_{LONG}", f"https://a:x/ whsec_{LONG}", f"whsec_{LONG} https://a.example",
     f"https://A.example:443/ whsec_{LONG}\nhttps://a.example whsec_{LONG}"],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number(line: str) -> None:
    with pytest.raises(SecretError, match=r"^line [123]: ") as caught:
        parse_endpoints(f"# one\n{line}")
    assert LONG not in str(caught.value)
