"""There and back through huggingface_hub itself, to a hub of our own on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub(ThreadingHTTPServer):
    """Repositories in memory: each a list of commits, each the files by name. No branch but main."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: list[bool] = []
        self.tokens: set[str | None] = set()

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """A commit's hash and its files."""
        commits = self.repositories[repository]
        number = len(commits) - 1 if revision == "main" else int(revision, 16) - 1
        return f"{number + 1:040x}", commits[number]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name == "someone/forbidden":
                return self.answer(403)
            if name in self.server.repositories:
                return self.answer(409, {"error": "it is there", "url": f"{self.server.url}/{name}"})
            self.server.private.append(asked.get("private") or asked.get("visibility") == "private")
            self.server.repositories[name] = []
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        repository, what = re.fullmatch(r"/api/models/(\w+/\w+)/(preupload|commit)/main", path).groups()
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        self.server.repositories[repository].append(files)
        commit = f"{len(self.server.repositories[repository]):040x}"
        return self.answer(200, {"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        asked = re.fullmatch(r"/(?:api/models/)?(\w+/\w+)/(resolve|tree)/(\w+)/?(.*)", path)
        if asked is None:
            return self.answer(404)
        repository, kind, revision, name = asked.groups()
        try:
            commit, files = self.server.files(repository, revision)
        except (KeyError, ValueError, IndexError) as error:
            missing = "RepoNotFound" if isinstance(error, KeyError) else "RevisionNotFound"
            return self.answer(404, X_Error_Code=missing)
        if kind == "tree":
            listed = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()]
            return self.answer(200, listed)
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return self.answer(200, files[name], ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815 - the base class's name


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


SCRIPT = """
import torch
from homebrew import GPT, GPTConfig, get_tokenizer
from homebrew.errors import ModelError
from homebrew.hub.peft import load_adapter
from homebrew.hub.load import load_model

shape = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4)
first, second = GPT(shape, seed=1), GPT(shape, seed=2)
print(first.push_to_hub("someone/tiny", get_tokenizer("bytes"), private=True))
print(second.push_to_hub("someone/tiny", get_tokenizer("bytes")))

def same(ours, theirs):
    return torch.equal(ours.lm_head.weight, theirs.lm_head.weight)

opened, tokenizer = load_model("someone/tiny")
assert same(opened, second) and tokenizer.name == "bytes"
assert same(GPT.from_pretrained("someone/tiny", revision=f"{1:040x}"), first)
assert same(GPT.from_pretrained("someone/tiny", local_files_only=True), second)
half = GPT.from_pretrained("someone/tiny", dtype=torch.bfloat16)
assert half.lm_head.weight.dtype == torch.bfloat16

def refused(name, **options):
    try:
        GPT.from_pretrained(name, **options)
    except ModelError as error:
        print(error)

refused("someone/none")
refused("someone/tiny", revision="v9")
refused("someone/pickled")
refused("someone/pickled", local_files_only=True)
for attempt in (
    lambda: load_adapter(first, "someone/tiny"),
    lambda: first.push_to_hub("someone/forbidden"),
    lambda: first.push_to_hub("no name"),
):
    try:
        attempt()
    except ModelError as error:
        print(error)
"""


def test_there_and_back(hub, tmp_path):
    hub.repositories["someone/pickled"] = [
        {"config.json": b'{"model_type": "gpt2"}', "pytorch_model.bin": b"\x80\x04."}
    ]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:homebrew", "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[:2] == [f"{hub.url}/someone/tiny/commit/{n:040x}" for n in (1, 2)]
    assert "someone/none is neither a folder nor a repository" in told[2]
    assert "someone/tiny has no revision 'v9'" in told[3]
    assert "pickled weights only (pytorch_model.bin)" in told[4]
    assert "someone/pickled has no model.safetensors" in told[5]  # what is not in the cache is not known of
    assert "someone/tiny has no adapter_config.json" in told[6]
    assert re.match(r"someone/forbidden could not be uploaded: .*403.*hf auth login", told[7])
    assert re.match(r"no name could not be uploaded: .*user/name", told[8])
    assert hub.private == [True]
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.repositories["someone/tiny"][1].keys() == {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "homebrew_tokenizer.json",
    }
