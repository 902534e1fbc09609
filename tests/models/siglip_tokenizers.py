"""Small tokenizers in the files of SigLIP 1 (spiece.model) and SigLIP 2 (tokenizer.json)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LENGTH = 64
SENTENCES = [
    "a photo of a cat",
    "a photo of two dogs on the grass",
    "the café is open, isn't it?",
    "a very large red bus in the city",
    "A Photo Of The City",
] * 4
# Capitals, punctuation, spaces of all kinds, accents, other scripts, emoji, tokens in a text. The
# last Sigma and the dotted I are lower-cased differently by Python and the tokenizers library.
TEXTS = [
    "a photo of a cat",
    "A Photo of a CAT.",
    "It isn't, is it?! (no-one's -- \"sure\")",
    "  two   dogs \t on\nthe  grass ",
    "Café ÉÉ ﬁne Straße",
    "ΟΔΟΣ İSTANBUL 東京 ☃☃",
    "red 😀 bus 👩‍🚒",
    "",
    "...",
    "a cat </s> a <EOS> dog <eos> <pad> <unk> bus",
]


def siglip(directory: Path, lower_case: bool = True) -> Path:
    """Write a tokenizer as in google/siglip-base-patch16-224: no tokenizer.json."""
    directory.mkdir()
    model = _train("unigram", 60, eos_piece="</s>", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (directory / "spiece.model").write_bytes(model)
    flags = {"lstrip": True, "normalized": True, "rstrip": True, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, **flags}
            for i, token in ((1, "</s>"), (2, "<unk>"))
        },
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "do_lower_case": lower_case,
        "eos_token": "</s>",
        "model_input_names": ["input_ids"],
        "model_max_length": LENGTH,
        "pad_token": "</s>",
        "processor_class": "SiglipProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }
    return _write(directory, config)


def siglip2(directory: Path, name: str = "GemmaTokenizer") -> Path:
    """Write a tokenizer as in google/siglip2-base-patch16-224, of the class `name`."""
    directory.mkdir()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special + pieces, show_progress=False),
    )
    document = json.loads(bpe.to_str())
    document["added_tokens"] = document["added_tokens"][: len(special)]  # Bytes are plain pieces.
    bpe = Tokenizer.from_str(json.dumps(document))
    bpe.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    bpe.enable_padding(direction="right", pad_id=0, pad_token="<pad>", length=LENGTH)
    bpe.save(str(directory / "tokenizer.json"))
    return _write(directory, _gemma_config(name))


def gemma_model(directory: Path, name: str = "GemmaTokenizer") -> Path:
    """Write only Gemma's sentencepiece file, tokenizer.model."""
    directory.mkdir()
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    plain = {"normalization_rule_name": "identity", "add_dummy_prefix": False}
    model = _train(
        "bpe",
        320,
        **ids,
        **plain,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        eos_piece="<eos>",
        bos_piece="<bos>",
    )
    (directory / "tokenizer.model").write_bytes(model)
    return _write(directory, _gemma_config(name))


def _gemma_config(name: str) -> dict[str, object]:
    return {
        "add_bos_token": False,
        "add_eos_token": True,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,  # GemmaTokenizer ignores it.
        "eos_token": "<eos>",
        "model_max_length": LENGTH,
        "pad_token": "<pad>",
        "padding_side": "right",
        "processor_class": "SiglipProcessor",
        "tokenizer_class": name,
        "unk_token": "<unk>",
    }


def _train(kind: str, size: int, **options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _write(directory: Path, config: dict[str, object]) -> Path:
    """Write the configs of tokenizer, model and images of a SigLIP at fixed resolution."""
    documents = {
        "tokenizer_config.json": config,
        "config.json": {"model_type": "siglip"},
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "SiglipProcessor",
            "size": {"height": 32, "width": 32},
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document))
    return directory
