"""Local folders, and uploads and downloads with the real huggingface_hub client against a Hub server on localhost."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import close_session, constants

from homebrew import GPT, GPTConfig, get_tokenizer
from homebrew.errors import ModelError
from homebrew.hub.load import load_model
from homebrew.hub.model_folder import local_folder
from homebrew.hub.peft import load_adapter

CONFIG = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4)


class HubServer(ThreadingHTTPServer):
    """In-memory Hub. Each repository is a list of commits on main, and each commit is a dictionary of files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: list[bool] = []
        self.tokens: set[str | None] = set()
        self.downloaded: list[str] = []

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return the hash and the files of a commit."""
        commits = self.repositories[repository]
        number = len(commits) - 1 if revision == "main" else int(revision, 16) - 1
        return commit_hash(number + 1), commits[number] if commits else {}


class HubHandler(BaseHTTPRequestHandler):
    server: HubServer

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
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            if name == "someone/forbidden":
                return self.answer(403)
            if name in self.server.repositories:
                return self.answer(409, {"error": "exists already", "url": f"{self.server.url}/{name}"})
            self.server.private.append(request.get("private") or request.get("visibility") == "private")
            self.server.repositories[name] = []
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        repository, action = re.fullmatch(r"/api/models/(\w+/\w+)/(preupload|commit)/main", path).groups()
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        _, previous = self.server.files(repository, "main")
        deleted = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        kept = {path: data for path, data in previous.items() if path not in deleted}
        self.server.repositories[repository].append(kept | files)
        commit = commit_hash(len(self.server.repositories[repository]))
        return self.answer(200, {"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/(?:api/models/)?(\w+/\w+)/(revision|resolve|tree)/(\w+)/?(.*)", path)
        if match is None:
            return self.answer(404)
        repository, action, revision, name = match.groups()
        if repository == "someone/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        try:
            commit, files = self.server.files(repository, revision)
        except (KeyError, ValueError, IndexError) as error:
            code = "RepoNotFound" if isinstance(error, KeyError) else "RevisionNotFound"
            return self.answer(404, X_Error_Code=code)
        if action == "revision":
            return self.answer(200, {"id": repository, "sha": commit, "siblings": []})
        if action == "tree":
            entries = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()]
            return self.answer(200, entries)
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if self.command == "GET":
            self.server.downloaded.append(name)
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return self.answer(200, files[name], ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815 - the base class's name


def commit_hash(number: int) -> str:
    return f"{number:040x}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hub server that huggingface_hub uses, with an empty local cache."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # the environment is read when the session is created
        yield server
        close_session()
        server.shutdown()


def same_weights(model, other):
    return torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_pushed_models_are_downloaded_again(hub):
    first, second = GPT(CONFIG, seed=1), GPT(CONFIG, seed=2)
    tokenizer = get_tokenizer("bytes")
    for number, (model, private) in enumerate([(first, True), (second, None)], start=1):
        url = model.push_to_hub("someone/tiny", tokenizer, private=private)
        assert url == f"{hub.url}/someone/tiny/commit/{commit_hash(number)}"
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

    loaded, loaded_tokenizer = load_model("someone/tiny")
    assert same_weights(loaded, second)
    assert loaded_tokenizer.name == "bytes"
    assert loaded.source == "someone/tiny"
    assert same_weights(GPT.from_pretrained("someone/tiny", revision=commit_hash(1)), first)
    hub.repositories.clear()
    for options in ({"local_files_only": True}, {"revision": commit_hash(1)}):
        cached = GPT.from_pretrained("someone/tiny", dtype=torch.bfloat16, **options)
        assert cached.lm_head.weight.dtype == torch.bfloat16


def test_a_push_removes_the_files_of_an_earlier_export(hub):
    GPT(CONFIG).push_to_hub("someone/tiny", get_tokenizer("bytes"))
    stale = ("generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    hub.repositories["someone/tiny"][0] |= dict.fromkeys((*stale, "tokenizer.json", "README.md"), b"{}")
    model = GPT(CONFIG, seed=3)
    model.push_to_hub("someone/tiny")  # without a tokenizer, its files are kept
    assert not {*stale} & hub.repositories["someone/tiny"][1].keys()
    assert {"tokenizer.json", "README.md", "vocab.json"} <= hub.repositories["someone/tiny"][1].keys()
    model.push_to_hub("someone/tiny", get_tokenizer("bytes"))
    assert "tokenizer.json" not in hub.repositories["someone/tiny"][2]
    loaded, tokenizer = load_model("someone/tiny")
    assert same_weights(loaded, model)
    assert tokenizer.name == "bytes"


def test_only_required_files_are_downloaded(hub):
    GPT(CONFIG).push_to_hub("someone/tiny")
    hub.repositories["someone/tiny"][0] |= {"pytorch_model.bin": b"\x80\x04.", "onnx/model.onnx": b"", "README.md": b""}
    GPT.from_pretrained("someone/tiny")
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors"]


def test_weights_of_another_architecture_are_not_downloaded(hub):
    hub.repositories["someone/llama"] = [{"config.json": b'{"model_type": "llama"}', "model.safetensors": b"large"}]
    with pytest.raises(ModelError, match=r"'llama'.*Only GPT-2"):
        GPT.from_pretrained("someone/llama")
    assert hub.downloaded == ["config.json"]


def test_pickled_weights_are_not_downloaded(hub):
    config = {"model_type": "gpt2", "n_positions": 8, "vocab_size": 256, "n_layer": 1, "n_head": 1, "n_embd": 4}
    hub.repositories["someone/pickled"] = [
        {"config.json": json.dumps(config).encode(), "pytorch_model.bin": b"\x80\x04."}
    ]
    with pytest.raises(ModelError, match=r"has no model\.safetensors.*Pickled weights .* are not supported"):
        GPT.from_pretrained("someone/pickled")
    assert hub.downloaded == ["config.json"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("someone/none", {}, r"no folder someone/none.* could not .* \(RepositoryNotFoundError.*Check the name"),
        ("someone/gated", {}, r"no folder someone/gated.* could not .* \(GatedRepoError.*hf auth login"),
        (
            "someone/tiny",
            {"revision": "v9"},
            r"no folder someone/tiny.* could not be downloaded \(RevisionNotFoundError",
        ),
        ("someone/tiny", {"local_files_only": True}, "no folder someone/tiny.*cache.*local_files_only is set"),
        ("no name", {}, "no folder no name.* could not be downloaded .*Check the name"),
    ],
)
def test_repositories_that_cannot_be_downloaded_raise_model_errors(hub, name, options, message):
    hub.repositories["someone/tiny"] = [{"config.json": b"{}"}]
    with pytest.raises(ModelError, match=message):
        GPT.from_pretrained(name, **options)


def test_an_unreachable_hub_raises_a_model_error(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match=r"no folder someone/tiny.* the Hub could not be reached"):
        GPT.from_pretrained("someone/tiny")


def test_a_repository_without_an_adapter_raises_a_model_error(hub):
    hub.repositories["someone/tiny"] = [{"config.json": b"{}"}]
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        load_adapter(GPT(CONFIG), "someone/tiny")


@pytest.mark.parametrize(("name", "reason"), [("someone/forbidden", "403.*hf auth login"), ("no name", "user/name")])
def test_rejected_uploads_raise_model_errors(hub, name, reason):
    with pytest.raises(ModelError, match=rf"{name} could not be uploaded: .*{reason}"):
        GPT(CONFIG).push_to_hub(name)


def test_missing_local_folders_raise_model_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none", "a/b/c"):
        with pytest.raises(ModelError, match="There is no folder"):
            local_folder(missing, [])
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match=r"There is no folder runs/frist\..* a folder runs"):
        local_folder("runs/frist", [])
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        local_folder(tmp_path / "file", [])
    with pytest.raises(ModelError, match="revision='main'"):
        local_folder(tmp_path, [], revision="main")
