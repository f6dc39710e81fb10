"""Keep the browser from contacting any other host than the page's own.

Gradio's page names other hosts in its metadata. The metadata is removed, and a content security policy forbids the browser to
load anything from another host.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["POLICY", "LocalOnly"]

Message = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
METADATA = re.compile(
    rb"<meta\s+(?:property|name)=\"(?:og|twitter):[^>]*>|<link[^>]*href=\"https?://[^>]*>"
    rb"|https://raw\.githubusercontent\.com/[^\"\\\s]*"  # example inputs in the description of the interface
)


class LocalOnly:
    """An ASGI application that adds POLICY to the responses of `inner` and removes METADATA from its pages."""

    def __init__(self, app: Application) -> None:
        self._inner = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        page: list[Message] = []  # the start of the response, while the body of a page is collected
        body = bytearray()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
                if any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                    page.append(message)
                    return
            elif page:
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    await _send_page(page.pop(), bytes(body), send)
                return
            await send(message)

        await self._inner(scope, receive, answer)


async def _send_page(start: Message, body: bytes, send: Callable[[Message], Awaitable[None]]) -> None:
    """Send a page without METADATA."""
    text = METADATA.sub(b"", body)
    others = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    await send({**start, "headers": [*others, (b"content-length", str(len(text)).encode())]})
    await send({"type": "http.response.body", "body": text})
