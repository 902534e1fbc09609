"""Run the Python blocks and merge commands of docs/pytorch.md unchanged, on small models."""

from __future__ import annotations

import copy
import shlex
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.models import checkpoint_io, convert
from modelstock_jax.models.model import classifier
from modelstock_jax.models.param_mapping import flatten
from tests.docs.blocks import ROOT, commands, python_blocks
from tests.models import small, small_models
from tests.parity.test_export import CONFIG, fine_tuned

PAGE = ROOT / "docs/pytorch.md"
BASE = "openai/clip-vit-base-patch32"
WISE_FT = ("zeroshot", "finetuned_1", "finetuned_2")
BLOCKS = [text for _, text in python_blocks(PAGE)]


def block(marker: str) -> str:
    """The only block of the page with this text."""
    (found,) = [text for text in BLOCKS if marker in text]
    return found


def run(marker: str, names: dict) -> dict:
    exec(compile(block(marker), f"{PAGE.name}: {marker}", "exec"), names)
    return names


def run_on_the_page(beginning: str) -> None:
    (command,) = [c for c in commands(PAGE) if c.startswith(beginning)]
    assert main(shlex.split(command)[1:]) == 0


def moved(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy with an update that is partly common to all seeds."""
    other = copy.deepcopy(module)
    common, own = (torch.Generator().manual_seed(s) for s in (0, seed))
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * (
                torch.randn(p.shape, generator=common) + torch.randn(p.shape, generator=own)
            )
    return other


def between(w0, merged, tuned) -> float:
    """t of merged = w0 + t (mean - w0), which must hold."""
    update = sum(tuned) / len(tuned) - w0
    ratio = float(((merged - w0) * update).sum() / (update * update).sum())
    torch.testing.assert_close(merged, w0 + ratio * update, atol=1e-6, rtol=0)
    return ratio


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def classified(checkpoint, text: str) -> dict:
    """Run the first block, or a variant of it, on an export of a checkpoint."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 31, 3), np.uint8)
    Image.fromarray(pixels).save("image.png")
    Path("runs/glyphs").mkdir(parents=True)
    checkpoint_io.save("runs/glyphs/model", checkpoint)
    names: dict = {}
    exec(compile(text, f"{PAGE.name}: classify", "exec"), names)
    return names | {"pixels": pixels}


def our_logits(directory: str, pixels: np.ndarray) -> np.ndarray:
    opened = checkpoint_io.load(directory)
    resized = opened.preprocessor.eval_transform()(pixels)
    return np.asarray(
        jax.jit(classifier(opened.config))(opened.replica(), opened.preprocessor(resized[None]))
    )[0]


def assert_same_class(ran: dict, labels: tuple[str, ...], capsys) -> None:
    ours = our_logits("runs/glyphs/model", ran["pixels"])
    np.testing.assert_allclose(ran["logits"].numpy(), ours, atol=2e-5, rtol=0)
    assert np.ptp(ours) > 0.1  # Unequal logits: the head counts.
    assert capsys.readouterr().out.startswith(labels[int(ours.argmax())])


def test_every_block_is_run():
    markers = ("def classify", "def save(", "ImageClassifier", "def merge()", "block_00")
    assert [block(marker) for marker in markers] == BLOCKS


def test_an_export_classifies_an_image(workdir, capsys):
    checkpoint = fine_tuned()
    ran = classified(checkpoint, block("def classify"))
    assert_same_class(ran, checkpoint.labels, capsys)
    run("block_00", ran)


def test_so_does_one_of_siglip_with_two_changes(workdir, capsys):
    plain, labels = small_models.checkpoint(small_models.CASES["siglip"]), ("cat", "dog", "gull")
    rng = np.random.default_rng(1)
    head = {
        "kernel": rng.standard_normal((36, 3)).astype(np.float32),
        "bias": rng.standard_normal(3).astype(np.float32),
    }
    replica = {"image_tower": plain.params["image_tower"], "head": head}
    assert "replace the class by `SiglipVisionModel` and `.image_embeds` by `.pooler_output`" in (
        PAGE.read_text()
    )
    text = block("def classify").replace("CLIPVisionModelWithProjection", "SiglipVisionModel")
    ran = classified(
        plain.with_replica(replica, labels), text.replace("image_embeds", "pooler_output")
    )
    assert_same_class(ran, labels, capsys)


def test_own_fine_tunes_are_saved_and_merged(workdir):
    checkpoint_io.save("clip", fine_tuned())
    clip, head = CLIPModel.from_pretrained("clip"), torch.nn.Linear(32, 3)
    names = {"pretrained": clip, "zero_shot_head": head}
    for seed in (1, 2):
        names |= {f"finetuned_{seed}": moved(clip, seed), f"head_{seed}": moved(head, seed)}
    run("def save(", names)
    run_on_the_page("modelstock compare base ft1 ft2")
    run_on_the_page("modelstock merge base ft1 ft2")
    merged = CLIPModel.from_pretrained("merged").state_dict()
    tuned = [names[f"finetuned_{seed}"].state_dict() for seed in (1, 2)]
    for name, w0 in clip.state_dict().items():
        if w0.ndim > 1:
            assert 0.4 < between(w0, merged[name], [state[name] for state in tuned]) < 0.95
    found = load_file("merged/head.safetensors")["weight"]
    heads = [names[f"head_{seed}"].weight.detach() for seed in (1, 2)]
    assert 0.2 < between(head.weight.detach(), found, heads) < 1


def wise_ft_state(seed: int) -> dict[str, torch.Tensor]:
    """The state dict of a classifier of wise-ft: `image_encoder.model.*`, without a transformer."""
    tuned = fine_tuned()
    params = small.perturbed(CONFIG, seed=0)
    params["image_tower"] = small.perturbed(CONFIG, seed)["image_tower"]
    leaves = dict(flatten(params))
    state = {
        f"image_encoder.model.{row.name}": torch.from_numpy(np.array(row.write(leaves)))
        for row in CONFIG.rows("openai")
        if not row.name.startswith("transformer.")
    }
    state["classification_head.weight"] = torch.from_numpy(tuned.head["kernel"] + seed).T
    state["classification_head.bias"] = torch.from_numpy(tuned.head["bias"] + seed)
    return state


def test_checkpoints_of_wise_ft(workdir, monkeypatch):
    """Its own code, which opens its pickles, is replaced."""
    states = {f"{name}.pt": wise_ft_state(seed) for seed, name in enumerate(WISE_FT)}
    modeling = types.ModuleType("src.models.modeling")
    opened = lambda path: types.SimpleNamespace(state_dict=lambda: states[path])  # noqa: E731
    modeling.ImageClassifier = types.SimpleNamespace(load=opened)
    for name in ("src", "src.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, modeling.__name__, modeling)
    run("ImageClassifier", {})
    run_on_the_page("modelstock merge zeroshot.safetensors")
    merged = load_file("merged/model.safetensors")
    back = {f"image_encoder.{k}" if k.startswith("model.") else k: v for k, v in merged.items()}
    assert back.keys() == states["zeroshot.pt"].keys()
    for name in ("text_projection", "visual.proj"):
        w0, *tuned = (state[f"image_encoder.model.{name}"] for state in states.values())
        if name == "visual.proj":
            assert 0 <= between(w0, merged[f"model.{name}"], tuned) < 1
        else:
            assert torch.equal(merged[f"model.{name}"], w0)
    checkpoint_io.save("clip", small.checkpoint(CONFIG, fine_tuned().directory))
    to_hugging_face = "python -m modelstock_jax.models.convert merged/model.safetensors"
    (command,) = [c for c in commands(PAGE) if c.startswith(to_hugging_face)]
    assert command.count(BASE) == 1
    convert.main(shlex.split(command.replace(BASE, "clip"))[3:])
    head = checkpoint_io.load("merged-hf").head
    assert torch.equal(merged["classification_head.weight"].T, torch.tensor(head["kernel"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_in_a_training_loop(dtype):
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(8, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 4),
    )
    base = torch.nn.Sequential(*layers).to(dtype)
    replicas = [copy.deepcopy(base) for _ in range(2)]
    optimizers = [torch.optim.AdamW(replica.parameters(), lr=0.01) for replica in replicas]
    ran = run("def merge()", {"base": base, "replicas": replicas})
    before = {name: w.clone() for name, w in ran["anchor"].items()}
    for period in range(2):
        for seed, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            draw = torch.Generator().manual_seed(10 * period + seed)
            x = torch.randn((32, 8), generator=draw).to(dtype)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(replica(x), x[:, :4].argmax(dim=1)).backward()
            optimizer.step()
        tuned = {name: w.clone() for name, w in ran["stacked"].items()}
        addresses = {name: w.data_ptr() for name, w in ran["stacked"].items()}
        stats = ran["merge"]()
        for name, w in ran["stacked"].items():
            assert w.data_ptr() == addresses[name] and w.dtype == dtype
            assert not torch.equal(tuned[name][0], tuned[name][1])
            for i, replica in enumerate(replicas):
                assert replica.get_parameter(name).data_ptr() == w[i].data_ptr()
            t, mean = float(stats.ratio[name]), tuned[name].double().mean(dim=0)
            w0 = before[name].double()
            rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
            expected = (w0 + t * (mean - w0)).expand_as(w)
            torch.testing.assert_close(w.double(), expected, atol=1e-6, rtol=rounding)
        assert all(torch.equal(ran["anchor"][name], w) for name, w in before.items())


def test_arrays_and_tensors_share_memory():
    """As the page says, for every dtype that torch trains in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.zeros(3, 64, dtype=dtype)
        array = jax.dlpack.from_dlpack(tensor)
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        assert torch.from_dlpack(array).data_ptr() == tensor.data_ptr()
