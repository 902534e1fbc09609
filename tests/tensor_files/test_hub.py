"""Hub names, resolved against a local server: what is fetched, and the errors."""

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
# huggingface_hub reads its cache path and endpoint once, on import, so this needs a new process.
RESOLVE = """
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
    """Environment of a process with a separate cache and hub."""
    return os.environ | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "PYTHONPATH": str(ROOT),
    }


def resolve_in_process(
    home: Path, *names: str, endpoint: str, offline: bool = False
) -> dict[str, str]:
    """Return the path or the error message of `resolve` for each name."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names],
        env=environment(home, endpoint, offline=offline),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with one model: its address and the requested paths."""
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
    requested: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
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
                # The hub uses the SHA-256 as ETag of large files.
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
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


def test_repository_is_fetched_without_pickles_and_code(hub, tmp_path):
    endpoint, requested = hub
    answers = resolve_in_process(
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
    assert any("/revision/v1.0" in path for path in requested)
    assert not any("pytorch_model" in p or "modeling" in p or "onnx" in p for p in requested)
    for name, nouns in (
        ("org/gone", (f"repository {endpoint}/org/gone", "`hf auth login`")),
        ("org/gated", ("gated", f"{endpoint}/org/gated", "`hf auth login`")),
        ("org/model@gone", (f"{endpoint}/org/model", "revision 'gone'")),
    ):
        message = answers[name]
        assert message.startswith(f"error: {name}: ") and "\n" not in message
        assert all(noun in message for noun in nouns), message
    # Offline, a fetched model is still available; for another, the message names the reason.
    offline = resolve_in_process(
        tmp_path, "org/model", "org/other", endpoint=endpoint, offline=True
    )
    assert offline["org/model"] == str(directory)
    assert offline["org/other"].startswith("error: org/other: ")
    assert "HF_HUB_OFFLINE" in offline["org/other"] and "cache" in offline["org/other"]


def test_subfolders(hub, tmp_path):
    endpoint, requested = hub
    before = len(requested)
    names = ("org/model", "in", "unet", "text[1]", "gone")
    directory = Path(resolve_in_process(tmp_path, *names, endpoint=endpoint)["org/model"])
    fetched = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert fetched == {"config.json", "model.safetensors", "unet/model.safetensors",
                     "text[1]/config.json"}  # fmt: skip
    np.testing.assert_array_equal(TensorFiles(directory / "unet")["w"], np.ones(2))
    never = ("model.bin", "code.py", "deep", "onnx")
    assert not any(name in path for name in never for path in requested[before:])
    # The branch is resolved once; all folders come from that commit.
    assert len([path for path in requested[before:] if "/revision/main" in path]) == 1
    assert all(COMMIT in path for path in requested[before:] if "/tree/" in path)
    offline = resolve_in_process(tmp_path, *names, endpoint=endpoint, offline=True)
    assert offline["org/model"] == str(directory)


def test_unreachable_hub(tmp_path):
    # Nothing listens on local port 9, so the connection fails immediately.
    message = resolve_in_process(tmp_path, "org/model", endpoint="http://127.0.0.1:9")["org/model"]
    assert message.startswith("error: org/model: ") and "http://127.0.0.1:9/org/model" in message
    assert "(ConnectError: " in message and "network" in message


def test_existing_path_takes_precedence(tmp_path, monkeypatch):
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
def test_names_that_are_not_hub_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # After `make demo`, runs/glyphs/model exists.
    with pytest.raises(UserError, match=message):
        resolve(name)


# The message must contain a noun after the name, and end with the name to pass instead.
NONE = "file or directory"
BARE_NAME = "file or directory.*"
DATASET = "dataset .*ORG/NAME"
URL = "URL.* path .*"
ADDRESS = "address .*"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", f"{BARE_NAME} openai-community/gpt2"),
        ("bert-base-uncased", f"{BARE_NAME} google-bert/bert-base-uncased"),
        ("t5-small", f"{BARE_NAME} google-t5/t5-small"),
        ("bert-of-mine", f"{BARE_NAME} ORG/NAME"),
        ("llama-3.1", f"{BARE_NAME} ORG/NAME"),
        ("org/model/", f"{BARE_NAME} org/model"),
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
def test_message_has_the_hub_name_to_pass_instead(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    with pytest.raises(UserError) as caught:
        resolve(name)
    error = str(caught.value)
    assert error.startswith(f"{name}: ") and re.fullmatch(rf".*{message}", error), error


def test_names_with_newlines_do_not_break_the_message():
    for name in ("a\nb", "https://huggingface.co/a\nb/c", "org/a\nb"):
        with pytest.raises(UserError) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)
