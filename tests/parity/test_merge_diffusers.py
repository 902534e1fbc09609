"""Models and pipelines of diffusers, merged by `modelstock merge` and opened again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from tests.parity.merge_inputs import (
    assert_merged,
    family,
    fine_tuned,
    merge,
    save_all,
    save_tensors,
    tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
_UNET = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    attention_head_dim=4,
)


def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        **_UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def conditioned():
    torch.manual_seed(1)
    return UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
    ).eval()


def autoencoder():
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def files(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if "safetensors" in path.name
    )


def opened(kind, directory, **how):
    """Open a model of diffusers; no key may be missing or unexpected."""
    model, report = kind.from_pretrained(directory, output_loading_info=True, **how)
    assert not any(report.values()), report
    return model.eval()


def computed(model) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if isinstance(model, AutoencoderKL):
            return model(torch.randn(1, 3, 16, 16, generator=noise)).sample
        if isinstance(model, UNet2DModel):
            return model(torch.randn(1, 3, 8, 8, generator=noise), 2).sample
        return model(
            torch.randn(1, 4, 8, 8, generator=noise), 2, torch.randn(1, 5, 16, generator=noise)
        ).sample


@pytest.mark.parametrize("make", [unet, conditioned, autoencoder])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_single_model(tmp_path, make, sharded):
    model = make()
    how = {"max_shard_size": "60KB"} if sharded else {}
    paths = save_all(tmp_path, model, lambda model, path: model.save_pretrained(path, **how))
    assert (len(files(paths[0])) > 1) == sharded
    assert merge(paths, tmp_path / "out", *(["--max-shard-size", "60KB"] if sharded else [])) == 0
    assert_merged(tmp_path / "out", paths)
    made = files(tmp_path / "out")
    assert all(name.startswith("diffusion_pytorch_model") for name in made), made
    if sharded:
        assert "diffusion_pytorch_model.safetensors.index.json" in made and len(made) > 2
    else:
        assert made == ["diffusion_pytorch_model.safetensors"]
    value = computed(opened(type(model), tmp_path / "out"))
    assert value.isfinite().all() and not torch.equal(value, computed(model))


def test_shards_of_one_model_and_one_file_of_another(tmp_path):
    model = unet()
    paths = save_all(tmp_path, model)
    fine_tuned(model, 1).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert merge([paths[0], tmp_path / "shards", paths[2]], tmp_path / "out") == 0
    assert_merged(tmp_path / "out", paths)
    opened(UNet2DModel, tmp_path / "out")


def test_a_variant_preserves_its_name(tmp_path):
    paths = save_all(
        tmp_path, unet(), lambda model, path: model.save_pretrained(path, variant="ema")
    )
    assert files(paths[0]) == ["diffusion_pytorch_model.ema.safetensors"]
    assert merge(paths, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(paths[0])
    opened(UNet2DModel, tmp_path / "out", variant="ema")


def test_a_pipeline_of_images(tmp_path):
    model = unet()
    paths = save_all(
        tmp_path,
        model,
        lambda model, path: DDPMPipeline(
            model, DDPMScheduler(num_train_timesteps=4)
        ).save_pretrained(path),
    )
    assert merge(paths, tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["unet/diffusion_pytorch_model.safetensors"]
    assert_merged(tmp_path / "out" / "unet", [path / "unet" for path in paths])
    assert (tmp_path / "out" / "model_index.json").read_bytes() == (
        paths[0] / "model_index.json"
    ).read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, DDPMPipeline)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 8, 8, 3) and np.isfinite(image).all()


def letter_tokenizer(folder: Path):
    """Return a CLIP tokenizer for the letters a to j."""
    folder.mkdir(parents=True)
    letters = [chr(97 + i) for i in range(10)]
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = hf.CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 40
    return tokenizer


def text_tower():
    return hf.CLIPTextModel(family("clip").config.text_config).eval()


def stable_diffusion(root, tuned=("unet", "vae", "text_encoder")):
    """Write a base and two fine-tunes of a pipeline, in which the components in `tuned` differ."""
    torch.manual_seed(3)
    models = {"unet": conditioned(), "vae": autoencoder(), "text_encoder": text_tower()}
    tokenizer = letter_tokenizer(root / "tokenizer")
    paths = [root / "base", root / "ft1", root / "ft2"]
    for i, path in enumerate(paths):
        of_path = {
            name: fine_tuned(model, i) if i and name in tuned else model
            for name, model in models.items()
        }
        StableDiffusionPipeline(
            **of_path,
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(num_train_timesteps=4),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)
    return paths


def assert_draws(directory):
    pipeline = DiffusionPipeline.from_pretrained(directory)
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("abc def", num_inference_steps=2, output_type="np", height=16, width=16).images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()


def test_a_pipeline_of_text_to_images(tmp_path):
    paths = stable_diffusion(tmp_path)
    assert merge(paths, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(paths[0])
    for name in ("unet", "vae", "text_encoder"):
        assert_merged(tmp_path / "out" / name, [path / name for path in paths])
    for name in ("tokenizer", "scheduler"):
        for file in (paths[0] / name).iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()
    assert_draws(tmp_path / "out")


def test_unchanged_components(tmp_path):
    paths = stable_diffusion(tmp_path, tuned=("unet",))
    assert merge(paths, tmp_path / "out") == 0
    for name in ("vae", "text_encoder"):
        made, base = tensors(tmp_path / "out" / name), tensors(paths[0] / name)
        assert made.keys() == base.keys()
        for key, value in made.items():
            np.testing.assert_array_equal(value, base[key], key)
    assert_merged(tmp_path / "out" / "unet", [path / "unet" for path in paths])
    assert_draws(tmp_path / "out")


def test_a_text_encoder_of_transformers_4(tmp_path):
    """The names are text_model.encoder... on the hub; transformers 5 saves encoder...."""
    paths = stable_diffusion(tmp_path)
    plain = {path: tensors(path / "text_encoder") for path in paths}
    save_tensors(
        paths[0] / "text_encoder",
        {
            n if n.startswith("text_model.") else f"text_model.{n}": torch.from_numpy(x)
            for n, x in plain[paths[0]].items()
        },
    )
    assert merge(paths, tmp_path / "out") == 0
    made = {
        n.removeprefix("text_model."): x
        for n, x in tensors(tmp_path / "out" / "text_encoder").items()
    }
    assert_merged(
        made, [{n.removeprefix("text_model."): x for n, x in plain[path].items()} for path in paths]
    )
    assert_draws(tmp_path / "out")


def test_a_fine_tuned_component_in_place_of_a_pipeline_is_an_error(tmp_path, capsys):
    paths = stable_diffusion(tmp_path)
    assert merge([paths[0], paths[1] / "unet", paths[2] / "unet"], tmp_path / "out") == 1
    assert capsys.readouterr().err.count("error:") == 1
    # The components without the pipeline are merged like any other model.
    assert merge([path / "unet" for path in paths], tmp_path / "out") == 0
    assert_merged(tmp_path / "out", [path / "unet" for path in paths])
