"""`push` against a hub of our own, which answers as the real one's interface does and keeps what it is sent."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import prunekit
from prunekit import InputError, PrunekitError
from prunekit.checkpoint.writer import Journal

REPO = "someone/pruned"


class Hub(ThreadingHTTPServer):
    """Makes repositories and branches, takes commits of regular files, and knows one token.

    Attributes:
        asked: method and path of every request, in order.
        made: what was said of the repository.
        files: branch -> name -> content of what was committed.
        refuse: path pattern -> status and sentence to answer with instead.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def do_GET(self) -> None:
        self.answer({"id": REPO, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        hub = self.server.endpoint
        if path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer({"url": f"{hub}/{REPO}"})
        elif path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            branch = self.server.files.setdefault(path.rsplit("/", 1)[1], {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    branch[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{hub}/{REPO}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({})

    def answer(self, content: dict[str, Any]) -> None:
        self.server.asked.append(f"{self.command} {self.path.split('?')[0]}")
        status = 200 if self.headers.get("Authorization") == "Bearer known" else 401
        message = "Invalid username or password."
        for pattern, refusal in self.server.refuse.items():
            if re.search(pattern, self.path):
                status, message = refusal
        text = json.dumps(content if status == 200 else {"error": message}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status != 200:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def push(folder: Path, hub: Hub, **options: Any) -> str:
    return prunekit.push(folder, REPO, endpoint=hub.endpoint, **{"token": "known", **options})


def test_what_the_run_wrote_is_committed_and_nothing_else(finished: Path, hub: Hub) -> None:
    (finished / "evaluation.json").write_text('{"texts": []}', encoding="utf-8")
    (finished / "notes.txt").write_text("mine", encoding="utf-8")
    for leftover in (".prunekit-hidden-0", ".prunekit-lock", ".config.json.prunekit-tmp"):
        (finished / leftover).touch()
    Journal.fresh(finished, {}).save()  # a kill behind the manifest leaves it
    address = push(finished, hub)
    assert address == f"{hub.endpoint}/{REPO}/commit/{'1' * 40}"
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("pruned", "someone")
    assert made.keys().isdisjoint({"visibility", "private"})
    outputs = json.loads((finished / "prunekit.json").read_text(encoding="utf-8"))["outputs"]
    pages = {"README.md", "report.html", "evaluation.json", "prunekit.json"}
    assert hub.files.keys() == {"main"}
    assert hub.files["main"] == {name: (finished / name).read_bytes() for name in {*outputs, *pages}}
    assert not any("/branch/" in request for request in hub.asked)


def test_a_private_repository_and_a_branch(finished: Path, hub: Hub) -> None:
    push(finished, hub, private=True, revision="half")
    (made,) = hub.made
    assert made.get("visibility") == "private" or made.get("private") is True  # as the library's release says it
    assert f"POST /api/models/{REPO}/branch/half" in hub.asked
    assert hub.files.keys() == {"half"}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "prunekit.json").unlink(), "holds no finished run .* --resume"),
        (
            lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + " "),
            "config.json changed",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json changed"),
    ],
)
def test_what_is_not_what_was_pruned_is_refused(finished: Path, hub: Hub, spoil: Any, sentence: str) -> None:
    spoil(finished)
    with pytest.raises(InputError, match=sentence):
        push(finished, hub)
    assert hub.asked == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(InputError, match="it is no folder"):
        push(tmp_path / "nothing", hub)


@pytest.mark.parametrize("name", ["a/b/c", "-pruned", "some one/pruned", ""])
def test_a_name_that_cannot_be_one_is_refused(finished: Path, hub: Hub, name: str) -> None:
    with pytest.raises(InputError, match="is no name of a repository: write it like name or owner/name"):
        prunekit.push(finished, name, endpoint=hub.endpoint, token="known")
    assert hub.asked == []


def test_without_a_token_nothing_is_asked(finished: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match=r"needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN"):
        push(finished, hub, token=None)
    assert hub.asked == []


def test_the_token_that_a_login_left_is_taken(finished: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "known")
    push(finished, hub, token=None)
    assert hub.files.keys() == {"main"}


def test_an_unknown_token_is_the_users(finished: Path, hub: Hub) -> None:
    with pytest.raises(InputError, match=r"does not know the token: log in again .*\(Invalid username or password\.\)"):
        push(finished, hub, token="another")
    assert hub.files == {}


def test_a_right_that_is_missing_is_the_users(finished: Path, hub: Hub) -> None:
    hub.refuse = {"/api/repos/create|/api/models/": (403, "You don't have the rights")}
    with pytest.raises(InputError, match=rf"may not write to '{REPO}': .*\(You don't have the rights\)"):
        push(finished, hub)


def test_a_hub_that_fails_is_not_the_users(finished: Path, hub: Hub) -> None:
    hub.refuse = {"/api/repos/create": (500, "out of order")}
    with pytest.raises(PrunekitError, match=rf"the hub did not take '{REPO}': out of order \(status 500\)") as caught:
        push(finished, hub)
    assert not isinstance(caught.value, InputError)


def test_a_hub_that_cannot_be_reached(finished: Path, hub: Hub) -> None:
    endpoint = hub.endpoint
    hub.server_close()
    with pytest.raises(
        PrunekitError, match=rf"'{REPO}' could not be uploaded: .*; the same command tries again"
    ) as caught:
        prunekit.push(finished, REPO, endpoint=endpoint, token="known")
    assert not isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
