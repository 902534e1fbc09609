"""Names on the hub, asked of a server on this machine: what is fetched, what is refused and how."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files import writer
from modelstock_jax.tensor_files.hub import resolve
from modelstock_jax.tensor_files.reader import TensorFiles

ROOT = Path(__file__).parents[2]
COMMIT = "1234567890" * 4
# The hub's cache and its address are read once, when huggingface_hub is imported.
ASK = """
import json, sys
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.hub import FILES, resolve
answers = {}
names, _, folders = " ".join(sys.argv[1:]).partition(" in ")
for name in names.split():
    try:
        answers[name] = str(resolve(name, ("*",) if folders else FILES, folders.split()))
    except UserError as error:
        answers[name] = f"error: {error}"
print(json.dumps(answers))
"""


def environment(home: Path, endpoint: str, *, offline: bool = False) -> dict[str, str]:
    """That of a process with a cache and a hub of its own."""
    return os.environ | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "PYTHONPATH": str(ROOT),
    }


def ask(home: Path, *names: str, endpoint: str, offline: bool = False) -> dict[str, str]:
    """What `resolve` says of each name."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=environment(home, endpoint, offline=offline),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with one model: its address, and the paths that were asked for."""
    source = tmp_path_factory.mktemp("source")
    writer.write_tensors(source / "model.safetensors", {"w": np.arange(6.0)})
    writer.write_indented_json(source / "config.json", {"model_type": "clip"})
    for name in ("unet/model.safetensors", "text[1]/config.json"):
        (source / name).parent.mkdir()
        writer.write_tensors(source / name, {"w": np.ones(2)})
    for name in ("pytorch_model.bin", "modeling.py", "onnx/config.json", "unet/model.bin",
                 "unet/code.py", "unet/deep/config.json"):  # fmt: skip
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"never to be fetched")
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = self.path.partition("?")[0]
            base = "/api/models/org/model/"
            if path.startswith("/api/models/org/gated"):
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif path.startswith(base + "revision/gone"):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(base + "revision/"):
                self.answer(200, json.dumps({"id": "org/model", "sha": COMMIT}).encode())
            elif path.startswith(base + "tree/"):
                files = [p for p in sorted(source.rglob("*")) if p.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": p.relative_to(source).as_posix(),
                        "size": p.stat().st_size,
                        "oid": f"{i:040x}",
                    }
                    for i, p in enumerate(files)
                ]
                self.answer(200, json.dumps(tree).encode())
            elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
                name = unquote(path.partition(f"/{COMMIT}/")[2])
                body = (source / name).read_bytes()
                # As the hub names large files.
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                self.answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": etag})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, status, body, headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_repository_is_fetched_without_what_runs_code(hub, tmp_path):
    endpoint, asked = hub
    answers = ask(
        tmp_path,
        "org/model",
        "org/model@v1.0",
        "org/gone",
        "org/gated",
        "org/model@gone",
        endpoint=endpoint,
    )
    directory = Path(answers["org/model"])
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]
    np.testing.assert_array_equal(TensorFiles(directory)["w"], np.arange(6.0))
    assert answers["org/model@v1.0"] == str(directory)
    assert any("/revision/v1.0" in path for path in asked)
    assert not any("pytorch_model" in p or "modeling" in p or "onnx" in p for p in asked)
    for name, nouns in (
        ("org/gone", (f"repository {endpoint}/org/gone", "`hf auth login`")),
        ("org/gated", ("gated", f"{endpoint}/org/gated", "`hf auth login`")),
        ("org/model@gone", (f"{endpoint}/org/model", "revision 'gone'")),
    ):
        said = answers[name]
        assert said.startswith(f"error: {name}: ") and "\n" not in said
        assert all(noun in said for noun in nouns), said
    # What was fetched is there without the hub; what was not says why.
    offline = ask(tmp_path, "org/model", "org/other", endpoint=endpoint, offline=True)
    assert offline["org/model"] == str(directory)
    assert offline["org/other"].startswith("error: org/other: ")
    assert "HF_HUB_OFFLINE" in offline["org/other"] and "cache" in offline["org/other"]


def test_folders_that_are_asked_for(hub, tmp_path):
    endpoint, asked = hub
    before = len(asked)
    names = ("org/model", "in", "unet", "text[1]", "gone")
    directory = Path(ask(tmp_path, *names, endpoint=endpoint)["org/model"])
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "unet/model.safetensors",
                     "text[1]/config.json"}  # fmt: skip
    np.testing.assert_array_equal(TensorFiles(directory / "unet")["w"], np.ones(2))
    never = ("model.bin", "code.py", "deep", "onnx")
    assert not any(name in path for name in never for path in asked[before:])
    # The branch is looked up once; all folders are of its commit.
    assert len([path for path in asked[before:] if "/revision/main" in path]) == 1
    assert all(COMMIT in path for path in asked[before:] if "/tree/" in path)
    offline = ask(tmp_path, *names, endpoint=endpoint, offline=True)
    assert offline["org/model"] == str(directory)


def test_no_way_to_the_hub(tmp_path):
    # Nothing listens on port 9 of this machine, so the refusal is at once.
    message = ask(tmp_path, "org/model", endpoint="http://127.0.0.1:9")["org/model"]
    assert message.startswith("error: org/model: ") and "http://127.0.0.1:9/org/model" in message
    assert "(ConnectError: " in message and "network" in message


def test_a_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model") == Path("org/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "^nowhere: "),
        ("/nowhere/model", "^/nowhere/model: "),
        ("./org/model", "^./org/model: "),
        ("runs/glyphs/model", "^runs/glyphs/model: "),
        (Path("org/model"), "^org/model: "),
        ("org/model.safetensors", "^org/model.safetensors: "),
        ("x" * 5000, "x: "),
    ],
)
def test_what_is_no_name_for_the_hub(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # After `make demo`, runs/glyphs/model is there.
    with pytest.raises(UserError, match=message):
        resolve(name)


# What the message must hold behind the name: a noun, and the name to give instead at its end.
NONE = "file or directory"
WRITTEN = "file or directory.*"
DATASET = "dataset .*ORG/NAME"
URL = "URL.* path .*"
ADDRESS = "address .*"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", f"{WRITTEN} openai-community/gpt2"),
        ("bert-base-uncased", f"{WRITTEN} google-bert/bert-base-uncased"),
        ("t5-small", f"{WRITTEN} google-t5/t5-small"),
        ("bert-of-mine", f"{WRITTEN} ORG/NAME"),
        ("llama-3.1", f"{WRITTEN} ORG/NAME"),
        ("org/model/", f"{WRITTEN} org/model"),
        ("model.bin", NONE),
        ("my.model.safetensors", NONE),
        ("./gpt2", NONE),
        ("/gpt2", NONE),
        ("a/b/c", NONE),
        ("datasets/org/name", DATASET),
        ("spaces/org/name", DATASET.replace("dataset", "space")),
        ("https://huggingface.co/datasets/org/name/tree/main", DATASET),
        ("https://huggingface.co/datasets/squad", DATASET),
        ("https://huggingface.co/org/name", f"{ADDRESS} org/name"),
        ("http://huggingface.co/org/name/", f"{ADDRESS} org/name"),
        ("huggingface.co/org/name", f"{ADDRESS} org/name"),
        ("hf.co/gpt2", f"{ADDRESS} openai-community/gpt2"),
        ("https://hf.co/org/name/tree/main", f"{ADDRESS} org/name"),
        ("https://huggingface.co/org/name/tree/v1.0?x=1#y", f"{ADDRESS} org/name@v1.0"),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", f"{ADDRESS} org/name"),
        ("https://hf.co/org/name/resolve/abc/model.safetensors", f"{ADDRESS} org/name@abc"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", f"{ADDRESS} org/name@refs/pr/1"),
        ("https://huggingface.co/gpt2/blob/main/config.json", f"{ADDRESS} openai-community/gpt2"),
        ("https://huggingface.co/org/name/discussions/3", f"{ADDRESS} org/name"),
        ("https://huggingface.co/org", f"{ADDRESS} ORG/NAME"),
        ("https://huggingface.co/", f"{ADDRESS} ORG/NAME"),
        ("hf://org/name", f"{ADDRESS} org/name"),
        ("hf://", f"{ADDRESS} ORG/NAME"),
        ("https://mirror.example/org/name", f"{ADDRESS} org/name"),
        ("https://example.com/model.safetensors", URL),
        ("s3://bucket/model", URL),
    ],
)
def test_what_to_give_for_the_hub_instead(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    with pytest.raises(UserError) as caught:
        resolve(name)
    said = str(caught.value)
    assert said.startswith(f"{name}: ") and re.fullmatch(rf".*{message}\.?", said), said


def test_no_name_breaks_the_line():
    for name in ("a\nb", "https://huggingface.co/a\nb/c", "org/a\nb"):
        with pytest.raises(UserError) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)
