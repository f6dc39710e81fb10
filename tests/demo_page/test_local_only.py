import asyncio

import pytest

from demo_page.local_only import POLICY, LocalOnly

PAGE = b"""<head>
<meta charset="utf-8" />
<meta
    property="og:image"
    content="https://example.org/a.jpg" />
<meta name="twitter:card" content="x">
<link rel="preconnect" href="https://example.org"><link rel="icon" href="./icon.png">
<script>info = {"url": "https://raw.githubusercontent.com/a/b/c.png"}</script></head>"""
EXPECTED = b"""<head>
<meta charset="utf-8" />


<link rel="icon" href="./icon.png">
<script>info = {"url": ""}</script></head>"""


def answer(kind, *parts):
    """The headers and body of a response of `kind` in parts, after LocalOnly."""

    async def inner(scope, receive, send):
        length = str(sum(map(len, parts))).encode()
        headers = [(b"content-type", kind), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(LocalOnly(inner)({"type": "http"}, None, send))
    assert sent[0]["status"] == 200
    return dict(sent[0]["headers"]), [message["body"] for message in sent[1:]]


def test_pages_lose_the_names_of_other_hosts():
    headers, (body,) = answer(b"text/html; charset=utf-8", PAGE[:150], PAGE[150:])
    assert body.split() == EXPECTED.split()
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"content-security-policy"] == POLICY.encode()


def test_other_responses_are_passed_on_in_parts():
    headers, bodies = answer(b"text/event-stream", PAGE, b"b")
    assert bodies == [PAGE, b"b"]
    assert headers[b"content-security-policy"] == POLICY.encode()


@pytest.mark.parametrize("source", ["https:", "http:", "*"])
def test_the_policy_allows_no_other_host(source):
    assert source not in POLICY.split()
    assert "connect-src 'self'" in POLICY
