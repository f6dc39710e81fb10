"""A hub behind huggingface_hub's HTTP client: one user's repositories in memory, and a list of all requests."""

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

__all__ = ["FakeHub"]

COMMIT = "0123456789" * 4
ENDPOINT = "https://huggingface.co"


class FakeHub:
    """Answers requests. `response` creates the client's responses; `token` is the only one that is accepted."""

    def __init__(self, response: Callable[..., Any], token: str = "hf_right") -> None:
        self.response, self.token = response, token
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.asked: list[str] = []

    def __call__(self, request: Any) -> Any:
        path = unquote(request.url.path)
        self.asked.append(f"{request.method} {path}")
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return self.response(401, json={"error": "Invalid credentials"})
        for start, answer in self.answers().items():
            if path.startswith(start):
                return answer(path, request)
        return self.response(404, json={"error": f"nothing at {path}"}, headers={"x-error-code": "RepoNotFound"})

    def answers(self) -> dict[str, Callable[[str, Any], Any]]:
        model = "/api/models/me/flow"
        return {
            "/api/whoami-v2": lambda path, request: self.response(200, json={"name": "me", "type": "user"}),
            "/api/repos/create": self._create,
            "/api/validate-yaml": lambda path, request: self.response(200, json={"errors": [], "warnings": []}),
            f"{model}/preupload": self._plan,
            f"{model}/commit": self._commit,
            f"{model}/tree": self._tree,
            model: self._describe,
            "/me/flow/resolve/": self._file,
        }

    def _create(self, path: str, request: Any) -> Any:
        self.created.append(json.loads(request.content))
        return self.response(200, json={"url": f"{ENDPOINT}/me/flow"})

    def _plan(self, path: str, request: Any) -> Any:
        names = [file["path"] for file in json.loads(request.content)["files"]]
        plan = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        return self.response(200, json={"files": plan})

    def _commit(self, path: str, request: Any) -> Any:
        for line in request.read().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        address = f"{ENDPOINT}/me/flow/commit/{COMMIT}"
        return self.response(200, json={"success": True, "commitOid": COMMIT, "commitUrl": address})

    def _tree(self, path: str, request: Any) -> Any:
        rows = [
            {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
            for name, content in self.files.items()
        ]
        return self.response(200, json=rows)

    def _describe(self, path: str, request: Any) -> Any:
        siblings = [{"rfilename": name} for name in self.files]
        return self.response(200, json={"id": "me/flow", "sha": COMMIT, "siblings": siblings, "private": True})

    def _file(self, path: str, request: Any) -> Any:
        name = path.split("/resolve/")[1].partition("/")[2]
        if name not in self.files:
            return self.response(404, headers={"x-error-code": "EntryNotFound", "x-repo-commit": COMMIT})
        content = self.files[name]
        headers = {"x-repo-commit": COMMIT, "etag": f'"{_digest(content)}"', "content-length": str(len(content))}
        return self.response(200, headers=headers, content=b"" if request.method == "HEAD" else content)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
