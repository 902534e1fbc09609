"""Pipelines, sentence-transformers and single components: all components in one plan."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import output
from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import make_plan
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.typed import load, stock, tensors, trio, weights, write
from tests.tensor_files.test_hub import environment

UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "mid_block.attentions.0.to_q.weight": (8, 8),
    "conv_out.bias": (4,),
}
TEXT = {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 4), "text_model.final.weight": (4,)}
VAE = {"encoder.conv_in.weight": (4, 3, 3, 3)}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
COPIED = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": {"steps_offset": 1},
    "feature_extractor/preprocessor_config.json": {"size": 8},
    "tokenizer/merges.txt": "a",
    "tokenizer/vocab.json": {"a": 1},
    "unet/config.json": {"_class_name": "UNet2DConditionModel"},
    "text_encoder/config.json": {"model_type": "clip_text_model"},
    "vae/config.json": {"_class_name": "AutoencoderKL"},
}
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
PARTS = {"unet": UNET, "text_encoder": TEXT, "vae": VAE}


def pipelines(root: Path) -> list[Path]:
    """A base and two fine-tunes with equal VAEs, which training does not change."""
    base = {part: weights(shapes) for part, shapes in PARTS.items()}
    paths = []
    for i, name in enumerate(("base", "ft1", "ft2")):
        models = {
            part: base[part] if not i or part == "vae" else weights(shapes, i, base[part])
            for part, shapes in PARTS.items()
        }
        paths.append(write(root / name, COPIED | {FILES[p]: x for p, x in models.items()}))
        write(
            root / name,
            {
                "unet/diffusion_pytorch_model.bin": "",
                "vae/notes.md": "",
                "model.png": "",
                "sd-v1.safetensors": {"model.x": np.ones(3)},
            },
        )
    return paths


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in files(directory)}


GENERATED = {"merge_report.json", "README.md", "angles.png"}


def test_pipeline(say, tmp_path):
    paths, out = pipelines(tmp_path), tmp_path / "out"
    result = say("merge", *paths, "--out", out)
    assert result.status == 0, result.err
    # Not the checkpoint in another format that some pipelines store in the top folder.
    assert files(out) == {*COPIED, *FILES.values(), *GENERATED}
    for name in COPIED:
        assert (out / name).read_bytes() == (paths[0] / name).read_bytes()
    for part in PARTS:
        models = [tensors(path / FILES[part]) for path in paths]
        merged = tensors(out / FILES[part])
        assert merged.keys() == PARTS[part].keys()
        for name, value in merged.items():
            expected = (
                models[0][name]
                if part == "vae"
                else stock(*(model[name] for model in models)).astype(np.float32)
            )
            np.testing.assert_array_max_ulp(value, expected, maxulp=1)
    report = load(out / "merge_report.json")
    assert {row["name"].partition("/")[0] for row in report["units"]} == PARTS.keys()
    assert set(report["outputs"]) == set(FILES.values())
    assert set(report["base"]["files"]) == set(FILES.values())
    assert 'library_name: "diffusers"' in (out / "README.md").read_text()


@pytest.mark.parametrize("pattern", ["unet/*", "unet/conv_in.weight"])
def test_one_component_of_a_pipeline(say, tmp_path, pattern):
    paths, out = pipelines(tmp_path), tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--include", pattern).status == 0
    base, merged = ({p: tensors(d / f) for p, f in FILES.items()} for d in (paths[0], out))
    assert not np.array_equal(merged["unet"]["conv_in.weight"], base["unet"]["conv_in.weight"])
    for part in ("text_encoder", "vae"):
        for name, value in merged[part].items():
            np.testing.assert_array_equal(value, base[part][name])


@pytest.mark.parametrize("shards", [False, True])
def test_single_component_keeps_its_file_name(say, tmp_path, shards):
    base = weights(UNET)
    paths = trio(
        tmp_path,
        {"config.json": {"_class_name": "UNet2DConditionModel"}},
        shapes=UNET,
        file="diffusion_pytorch_model.safetensors",
    )
    out = tmp_path / "out"
    assert (
        say("merge", *paths, "--out", out, *(["--max-shard-size", "1KB"] if shards else [])).status
        == 0
    )
    written = {name for name in files(out) if "safetensors" in name}
    if shards:
        index = "diffusion_pytorch_model.safetensors.index.json"
        assert index in written and len(written) > 2
        assert set(load(out / index)["weight_map"]) == base.keys()
        assert all(name.startswith("diffusion_pytorch_model-0000") for name in written - {index})
    else:
        assert written == {"diffusion_pytorch_model.safetensors"}
    assert tensors(out).keys() == base.keys()


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model.fp16", "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("sd_xl_base_1.0", "sd_xl_base_1.0.safetensors.index.json"),
    ],
)
def test_index_name_of_a_variant(say, tmp_path, stem, index):
    paths = trio(tmp_path, shapes=UNET, file=f"{stem}.safetensors")
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--max-shard-size", "1KB").status == 0
    assert (out / index).is_file()
    assert all(name.startswith(f"{stem}-0000") for name in load(out / index)["weight_map"].values())
    assert tensors(out).keys() == UNET.keys()


def test_components_in_shards(say, tmp_path):
    paths, out = pipelines(tmp_path), tmp_path / "out"
    for path in paths:
        unet = tensors(path / FILES["unet"])
        (path / FILES["unet"]).unlink()
        write_directory_tensors(path / "unet", unet, 400)
    assert say("merge", *paths, "--out", out, "--max-shard-size", "400B").status == 0
    for part, shapes in PARTS.items():
        merged = tensors(out / part)
        assert merged.keys() == shapes.keys()
    # In the base, the files have the names of write_directory_tensors: model-00001-of-...
    index = load(out / "unet/model.safetensors.index.json")
    assert all("/" not in file for file in index["weight_map"].values())
    assert not any("/" in name for name in index["weight_map"])


class _Killed(BaseException):
    pass


def test_pipeline_resumes_after_a_kill(tmp_path, monkeypatch):
    paths = pipelines(tmp_path)
    base = open_source(str(paths[0]))
    plan = make_plan(
        base, [open_source(str(p)) for p in paths[1:]], Options(threads=1, max_shard_bytes=600)
    )
    assert len(plan.files) > 3
    run(plan, tmp_path / "uninterrupted")
    finish, done = output.Output._finish, []

    def stop(self, file, writer):
        if len(done) == 2:
            raise _Killed
        finish(self, file, writer)
        done.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "_finish", stop)
        with pytest.raises(_Killed):
            run(plan, tmp_path / "out")
    (staging,) = [p for p in tmp_path.iterdir() if p.name.startswith(".out")]
    assert {name for name in files(staging) if "safetensors" in name} == set(done)
    report = run(plan, tmp_path / "out")
    assert report.resumed == tuple(sorted(done))
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_overwrite_removes_all_files_of_the_old_directory(say, tmp_path):
    paths, out = pipelines(tmp_path), tmp_path / "out"
    write(out, {"old/model.safetensors": {"w": np.ones(2)}, "unet/old.json": {}})
    result = say("merge", *paths, "--out", out)
    assert result.status == 1 and "--overwrite" in result.err
    assert say("merge", *paths, "--out", out, "--overwrite").status == 0
    assert files(out) == {*COPIED, *FILES.values(), *GENERATED}


def test_error_for_a_pipeline_and_one_component(say, tmp_path):
    paths = pipelines(tmp_path)
    units = [path / "unet" for path in paths]
    result = say("merge", paths[0], *units[1:], "--out", tmp_path / "out")
    assert result.status == 1 and result.err.count("\n") == 1
    assert f" {paths[0] / 'unet'} " in result.err
    result = say("merge", units[0], *paths[1:], "--out", tmp_path / "out")
    assert result.status == 1
    assert f" {paths[1] / 'unet'} " in result.err
    assert say("merge", *units, "--out", tmp_path / "out").status == 0


def test_fine_tune_without_some_components(say, tmp_path):
    """Training may save only trained components: `--missing-tensors base` copies the others."""
    paths = pipelines(tmp_path)
    for path in paths[1:]:
        (path / FILES["vae"]).unlink()
        (path / "vae/config.json").unlink()
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "vae/encoder.conv_in.weight" in result.err
    assert "--missing-tensors base" in result.err
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--missing-tensors", "base").status == 0
    np.testing.assert_array_equal(
        tensors(out / FILES["vae"])["encoder.conv_in.weight"],
        tensors(paths[0] / FILES["vae"])["encoder.conv_in.weight"],
    )


@pytest.mark.parametrize("suffix", ["bin", "msgpack", "onnx", "h5", "ckpt"])
def test_error_names_a_component_in_another_format(say, tmp_path, suffix):
    """Without an error, the component would be missing from the merged pipeline."""
    paths = pipelines(tmp_path)
    for path in paths:
        (path / FILES["vae"]).unlink()
        (path / f"vae/model.{suffix}").write_bytes(b"\x80\x04")
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and str(paths[0] / "vae") in result.err


@pytest.mark.parametrize("name", ["../base", "/etc"])
def test_error_for_an_index_with_a_folder_outside_of_the_directory(say, tmp_path, name):
    paths = pipelines(tmp_path)
    write(paths[0], {"model_index.json": INDEX | {name: ["a", "b"]}})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and f"{paths[0]}: {name!r}" in result.err


SENTENCES = {
    "config_sentence_transformers.json": {"prompts": {}},
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 4, "out_features": 2},
}
DENSE = {"linear.weight": (2, 4), "linear.bias": (2,)}


def sentence_transformers(root: Path, folder: str) -> list[Path]:
    """Models with the encoder in `folder`, pooling, and a dense layer with weights."""
    kinds = {
        folder: "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Normalize": "Normalize",
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    prefix = f"{folder}/" if folder else ""
    extra = {
        "modules.json": modules,
        f"{prefix}config.json": {"model_type": "bert"},
        f"{prefix}tokenizer.json": {},
        f"{prefix}vocab.txt": "a",
        f"{prefix}sentence_bert_config.json": {"max_seq_length": 8},
        **SENTENCES,
    }
    paths = trio(root, extra, shapes=TEXT, file=f"{prefix}model.safetensors")
    base = weights(DENSE)
    for i, path in enumerate(paths):
        write(path, {"2_Dense/model.safetensors": weights(DENSE, i, base) if i else base})
        (path / "3_Normalize").mkdir()
    return paths


@pytest.mark.parametrize("folder", ["", "0_Transformer"])
def test_sentence_transformer(say, tmp_path, folder):
    paths, out = sentence_transformers(tmp_path, folder), tmp_path / "out"
    result = say("merge", *paths, "--out", out)
    assert result.status == 0, result.err
    assert files(out) == files(paths[0]) | GENERATED
    for part, shapes in ((folder, TEXT), ("2_Dense", DENSE)):
        models = [tensors(path / part / "model.safetensors") for path in paths]
        merged = tensors(out / part / "model.safetensors")
        assert merged.keys() == shapes.keys()
        for name, value in merged.items():
            expected = stock(*(model[name] for model in models)).astype(np.float32)
            np.testing.assert_array_max_ulp(value, expected, maxulp=1)
    for name in files(paths[0]):
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (paths[0] / name).read_bytes()
    assert 'library_name: "sentence-transformers"' in (out / "README.md").read_text()
    # Patterns match the tensors of a module with its folder as prefix.
    out = tmp_path / "dense"
    assert say("merge", *paths, "--out", out, "--include", "2_Dense/*").status == 0
    name = next(iter(TEXT))
    np.testing.assert_array_equal(
        tensors(out / folder / "model.safetensors")[name],
        tensors(paths[0] / folder / "model.safetensors")[name],
    )


def plain_base(root: Path, folder: str, dense: bool) -> list[Path]:
    """Fine-tunes saved by sentence-transformers, and their base saved by transformers."""
    paths = sentence_transformers(root, folder)
    if not dense:
        for path in paths[1:]:
            (path / "2_Dense/model.safetensors").unlink()
    base = write(
        root / "plain",
        {
            "config.json": {"model_type": "bert"},
            "tokenizer.json": {},
            "vocab.txt": "a",
            "model.safetensors": tensors(paths[0] / folder / "model.safetensors"),
        },
    )
    return [base, *paths[1:]]


def test_sentence_transformers_of_a_plain_base(say, tmp_path):
    """The pooling is dropped only with `--config-from base`."""
    paths = plain_base(tmp_path, "", dense=False)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "modules.json, 1_Pooling" in result.err
    assert "--config-from model:1" in result.err and "--config-from base" in result.err
    out = tmp_path / "from_model"
    assert say("merge", *paths, "--out", out, "--config-from", "model:1").status == 0
    assert files(out) == files(paths[1]) | GENERATED
    out = tmp_path / "plain_out"
    assert say("merge", *paths, "--out", out, "--config-from", "base").status == 0
    assert files(out) == files(paths[0]) | GENERATED
    assert say("compare", *paths).status == 0


def test_dense_module_of_fine_tunes_of_a_plain_base(say, tmp_path):
    paths, out = plain_base(tmp_path, "", dense=True), tmp_path / "out"
    result = say("merge", *paths, "--out", out)
    assert result.status == 1 and "2_Dense/linear.weight" in result.err
    result = say("merge", *paths, "--out", out, "--head", "finetuned")
    assert result.status == 0, result.err
    assert any("2_Dense" in note and "model:1" in note for note in result.notes)
    assert files(out) == files(paths[1]) | GENERATED
    for name in ("modules.json", "2_Dense/config.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (paths[1] / name).read_bytes()
    # Tensors without modules.json, or modules.json without tensors, cannot be opened.
    for options in (
        ("--head", "finetuned", "--config-from", "base"),
        ("--missing-tensors", "base", "--config-from", "model:1"),
    ):
        result = say("merge", *paths, "--out", tmp_path / "no", *options)
        assert result.status == 1 and "2_Dense" in result.err, result.err
        assert " ".join(options[2:]) in result.err


def test_plain_base_of_an_encoder_in_a_folder(say, tmp_path):
    """Its tensors are written to the top folder, which modules.json of the fine-tunes lacks."""
    paths = plain_base(tmp_path, "0_Transformer", dense=False)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "modules.json" in result.err and "model:1" not in result.err
    result = say("merge", *paths, "--out", tmp_path / "out", "--config-from", "model:1")
    assert result.status == 1 and "'0_Transformer'" in result.err
    assert say("merge", *paths, "--out", tmp_path / "out", "--config-from", "base").status == 0


def test_two_layouts_of_one_sentence_transformer(say, tmp_path):
    old = sentence_transformers(tmp_path / "old", "0_Transformer")
    new = sentence_transformers(tmp_path / "new", "")
    for base, tuned in ((old[0], new[1:]), (new[0], old[1:])):
        out = base / "../out"
        result = say("merge", base, *tuned, "--out", out)
        assert result.status == 0, result.err
        assert files(out) == files(base) | GENERATED
        say("merge", *(old if base is old[0] else new), "--out", base / "../same")
        for name in files(base):
            if name.endswith(".safetensors"):
                assert (out / name).read_bytes() == (base / "../same" / name).read_bytes()


def test_router(say, tmp_path):
    """The folders of a router are in its config, not in modules.json."""
    modules = [{"path": "", "type": "sentence_transformers.models.Router"}]
    kinds = {"query_0_Static": "x.Static", "document_0_Transformer": "x.Transformer"}
    extra = {
        "modules.json": modules,
        "router_config.json": {"types": kinds},
        "query_0_Static/config.json": {},
        "document_0_Transformer/config.json": {},
    }
    paths = trio(tmp_path, extra, shapes=TEXT, file="document_0_Transformer/model.safetensors")
    assert say("merge", *paths, "--out", tmp_path / "out").status == 0
    assert files(tmp_path / "out") == files(paths[0]) | GENERATED


@pytest.mark.parametrize(
    ("folder", "index"),
    [
        ("0_Transformer", {"modules.json": [{"path": "0_Transformer", "type": "x.Transformer"}]}),
        ("text_encoder", {"model_index.json": {"text_encoder": ["transformers", "CLIPTextModel"]}}),
    ],
)
def test_config_of_a_component_has_added_tokens_and_dtype(say, tmp_path, folder, index):
    name = "embeddings.word_embeddings.weight"
    config = {"model_type": "bert", "vocab_size": 6, "torch_dtype": "float32"}
    base = weights({name: (6, 4), "w": (4, 4)})
    paths = [
        write(
            tmp_path / "base",
            {
                **index,
                f"{folder}/config.json": config,
                f"{folder}/tokenizer.json": {"b": 1},
                f"{folder}/model.safetensors": base,
            },
        )
    ]
    for i in (1, 2):
        tuned = weights({name: (8, 4), "w": (4, 4)}, i)
        paths.append(
            write(
                tmp_path / f"ft{i}",
                {
                    **index,
                    f"{folder}/config.json": config | {"vocab_size": 8},
                    f"{folder}/tokenizer.json": {"t": 1},
                    f"{folder}/model.safetensors": tuned,
                },
            )
        )
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--vocab-mismatch", "longest", "--dtype", "bf16")
    assert result.status == 0, result.err
    assert tensors(out / folder)[name].shape == (8, 4)
    written = load(out / folder / "config.json")
    assert written == config | {"vocab_size": 8, "torch_dtype": "bfloat16"}
    assert load(out / folder / "tokenizer.json") == {"t": 1}


def test_quantization_keys_of_every_component_are_removed(say, tmp_path):
    """The dtype in each config is that of the component; the third one is not quantized."""
    index = {"_class_name": "P", **{part: ["t", "T"] for part in ("a", "b", "vae")}}
    values = weights({"w.weight": (16, 8)})["w.weight"]
    paths = []
    for k in range(3):
        tuned = values + np.float32(0.05) * weights({"w": (16, 8)}, k + 1)["w"] * bool(k)
        scale = np.float32(np.abs(tuned).max() / 448)
        codes = {
            "w.weight": (tuned / scale).astype(ml_dtypes.float8_e4m3fn),
            "w.weight_scale": np.full((16, 1), scale),
        }
        entry = {"quantization_config": {"quant_method": "fp8"}}
        paths.append(
            write(
                tmp_path / str(k),
                {
                    "model_index.json": index,
                    "a/model.safetensors": codes,
                    "b/model.safetensors": codes,
                    "vae/model.safetensors": {"w.weight": tuned},
                    "a/config.json": {"model_type": "t", "torch_dtype": "float8_e4m3fn", **entry},
                    "b/config.json": {
                        "_class_name": "B",
                        "text_config": {"dtype": "float16", **entry},
                    },
                    "vae/config.json": {"model_type": "v", "torch_dtype": "float32"},
                },
            )
        )
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--dequantize")
    assert result.status == 0, result.err
    assert load(out / "a/config.json") == {"model_type": "t", "torch_dtype": "bfloat16"}
    assert load(out / "b/config.json") == {"_class_name": "B", "text_config": {"dtype": "bfloat16"}}
    assert load(out / "vae/config.json") == {"model_type": "v", "torch_dtype": "float32"}
    codes = {part: tensors(out / part)["w.weight"].dtype for part in ("a", "b", "vae")}
    assert [str(code) for code in codes.values()] == ["bfloat16", "bfloat16", "float32"]
    assert not any("quantization_config" in note or "dtype" in note for note in result.notes)


def test_error_for_a_directory_without_weights(say, tmp_path):
    paths = [
        write(tmp_path / n, {"model_index.json": INDEX, "unet/config.json": {}}) for n in "abc"
    ]
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and f"{paths[0]}: " in result.err and result.err.count("\n") == 1
    assert "model.safetensors.index.json" in result.err


@pytest.fixture
def hub(tmp_path):
    """A hub that serves directories as repositories `org/NAME`."""
    commit = "1234567890" * 4

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models")
            _, org, name, kind, rest = [*path.split("/", 4), "", ""][:5]
            root = tmp_path / "served" / name
            if org != "org" or not root.is_dir():
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif kind == "revision" or not kind:
                self.answer(200, json.dumps({"id": f"org/{name}", "sha": commit}).encode())
            elif kind == "tree":
                self.answer(
                    200,
                    json.dumps(
                        [
                            {
                                "type": "file",
                                "path": file,
                                "size": (root / file).stat().st_size,
                                "oid": f"{i:040x}",
                            }
                            for i, file in enumerate(sorted(files(root)))
                        ]
                    ).encode(),
                )
            else:
                body = (root / rest.partition("/")[2]).read_bytes()
                self.answer(200, body, {"X-Repo-Commit": commit, "ETag": f'"{hash(body):x}"'})

        do_HEAD = do_GET

        def answer(self, status, body, headers=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


RUN = """
import sys
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.commands import PlotProcess
PlotProcess.finish = lambda plot: None
sys.exit(main(sys.argv[1:]))
"""


def test_pipelines_and_modules_on_the_hub(hub, tmp_path):
    """The folders that the index lists are fetched; pickles and other folders are not."""
    served = tmp_path / "served"
    kinds = {
        "pipeline": pipelines,
        "modules": lambda root: sentence_transformers(root, ""),
        "older": lambda root: sentence_transformers(root, "0_Transformer"),
    }
    for kind, make in kinds.items():
        for path in make(tmp_path / kind):
            path.rename(served.joinpath(f"{kind}-{path.name}")) if served.is_dir() else (
                served.mkdir(),
                path.rename(served / f"{kind}-{path.name}"),
            )
        paths = [served / f"{kind}-{name}" for name in ("base", "ft1", "ft2")]
        write(paths[0], {"onnx/config.json": {}, "unet/code.py": ""})
        for source, out in ((paths, "local"), ([f"org/{p.name}" for p in paths], "hub")):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    RUN,
                    "merge",
                    *map(str, source),
                    "--out",
                    str(tmp_path / f"{kind}-{out}"),
                ],
                env=environment(tmp_path / "cache", hub),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
        local, fetched = (contents(tmp_path / f"{kind}-{out}") for out in ("local", "hub"))
        for written in (local, fetched):
            del written["merge_report.json"], written["README.md"]
        assert fetched == local and any(name.endswith(".safetensors") for name in local)
    cached = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert not {"diffusion_pytorch_model.bin", "onnx", "code.py", "sd-v1.safetensors"} & cached
