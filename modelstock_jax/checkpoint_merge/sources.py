"""Open the inputs of a merge: the tensors of a checkpoint, read by name and range."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.lora import CONFIG, WEIGHTS, Adapter, is_adapter
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo, note, renames
from modelstock_jax.errors import UserError, listed, suggest
from modelstock_jax.merging.anchor_rounding import half_ulp_square
from modelstock_jax.tensor_files.checksums import RangeChecksum, checksum_file
from modelstock_jax.tensor_files.hub import resolve
from modelstock_jax.tensor_files.reader import DTYPES, HEAD, PICKLES, TensorFiles, read_json

PIPELINE, MODULES = "model_index.json", "modules.json"
ROUTER = "router_config.json"
# The directory of every tokenizer contains one of these.
TOKENIZERS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Weights in other formats: a folder with them is opened, so that the error names the format.
_OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".gguf")
HEAD_PREFIX = f"{HEAD}:"
# Files that a model needs in addition to its tensors, by suffix and prefix; never pickles or code.
ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
LICENSES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
PATTERNS = ("*.safetensors", *(f"*{end}" for end in ENDINGS), *(f"{name}*" for name in LICENSES))
# Read first: they list the folders of a model.
_INDEXES = (PIPELINE, MODULES, ROUTER)
# Next to the index of a pipeline there may be one large file with the same model in another format.
_OF_PIPELINES = (
    *(f"{stem}*.safetensors" for stem in ("model", "diffusion_pytorch_model")),
    *PATTERNS[1:],
)
_SHA256, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
# Names of factors in the first releases of diffusers, LyCORIS, XLabs and IA3.
_OTHER_ADAPTER = re.compile(
    r"(?:^|[._])lora\d?\.(?:down|up)\.|\.hada_w\d|\.lokr_w\d|\.ia3_l\b|\.oft_(?:r|blocks)\b"
)
_ADAPTABLE = ("BF16", "F16", "F32", "F64")


class Source:
    """A checkpoint in safetensors.

    Attributes:
      label: the text that the user typed
      directory: directory of the config and tokenizer files; None for a single file
      tensors: name -> `TensorInfo`
      components: prefix of a tensor name -> stem of its output file
      aliases: name -> the stored tensor that it refers to, from the `__metadata__` of a file
      notes: notes about this input for the report
      formed: names of tensors that are computed, not stored, so that a read costs arithmetic
      parts: the models that its layers are from; empty if it is one model
      shares_tokenizer: whether its tokenizer is that of all models of the merge
      added_tokens: tokens that are added to its tokenizer, as tokenizer.json has them
      derivation: what the tensors depend on in addition to the files, as plain values
    """

    parts: tuple[Source, ...] = ()
    shares_tokenizer: bool = False
    added_tokens: tuple[dict[str, Any], ...] = ()
    derivation: Any = None

    def __init__(self, label: str, path: Path):
        self.label = label
        self.directory = path if path.is_dir() else None
        opened = open_all(path)
        self.components = {prefix: stem for prefix, (stem, _) in opened.items()}
        self._stored = {
            prefix + stored: (files, stored)
            for prefix, (_, files) in opened.items()
            for stored in files
        }
        self.aliases = {
            prefix + name: prefix + stored
            for prefix, (_, files) in opened.items()
            for name, stored in files.aliases.items()
        }
        self.tensors = {
            name: TensorInfo(files.shape(stored), files.code(stored))
            for name, (files, stored) in self._stored.items()
        }
        self.notes: list[str] = []
        self.formed: frozenset[str] = frozenset()
        self._watched: dict[Path, RangeChecksum] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(sorted({files.files[stored] for files, stored in self._stored.values()}))

    @property
    def tokenizer_directory(self) -> Path | None:
        """The directory of the tokenizer files: that of the model."""
        return self.directory

    @property
    def num_bytes(self) -> int:
        """Size of the files that are read, in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return values that its config.json must have: dotted key -> value.

        Args:
          config: content of the config.json
        """
        del config
        return {}

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read elements [start, stop) of the flattened tensor, in its stored dtype. Thread-safe.

        Args:
          name: name of the tensor
          start: index of the first element
          stop: index after the last element
          out: uint8 buffer to read into, which saves an allocation; by default a new one

        Returns:
          [stop - start]
        """
        files, stored = self._stored[name]
        return files.read(stored, start, stop, out)

    def stored_dtype(self, name: str) -> np.dtype:
        """Return the dtype in which a tensor is stored, which limits its precision."""
        return DTYPES[self.tensors[name].code]

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the maximum squared rounding error of the elements [start, stop), float64."""
        return half_ulp_square(self.read(name, start, stop))

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Add values that were read to the checksum of their file, if `watch` was called."""
        if self._watched:
            files, stored = self._stored[name]
            file, offset = files.file_offset(stored, start)
            if (checksum := self._watched.get(file)) is not None:
                checksum.update(offset, values.view(np.uint8).data)

    def watch(self) -> None:
        """Start the CRC-32 checksums of the files, which `note` updates and `checksums` returns."""
        self._watched = {
            path: RangeChecksum(path.stat().st_size)
            for path in self.files
            if _hub_sha256(path) is None
        }

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Return the checksum of each file as `kind:digits`, by path.

        Bytes that were not passed to `note` are read now. Files in the cache of the hub have their
        SHA-256 as name, which is returned for any `kind`.
        """
        checksums = {}
        for path in self.files:
            if sha256 := _hub_sha256(path):
                checksum = f"sha256:{sha256}"
            elif kind == "crc32" and path in self._watched:
                checksum = f"{kind}:{self._watched[path].complete(path)}"
            else:
                checksum = f"{kind}:{checksum_file(path, kind)}"
            checksums[self._relative(path)] = checksum
        return checksums

    def _relative(self, path: Path) -> str:
        """Return the path in the directory of the model: components may have equal file names."""
        if self.directory is None or not path.is_relative_to(self.directory):
            return path.name
        return path.relative_to(self.directory).as_posix()


class AdaptedSource(Source):
    """A base with a LoRA adapter: W + s B A, computed for the requested range."""

    def __init__(self, label: str, base: Source, adapter: Adapter, *, shared_base: bool = False):
        self.label, self.directory = label, base.directory
        self.base, self.adapter, self._shared_base = base, adapter, shared_base
        self.components, self.aliases = base.components, base.aliases
        self.tensors = dict(base.tensors)
        self.notes = [] if shared_base else list(base.notes)
        if adapter.base and not same_model(adapter.base, base.label):
            self.notes.append(
                f"{adapter.directory} was trained on {adapter.base!r} and is applied to "
                f"{base.label}"
            )
        self._rename()
        for name, stored in adapter.replacements.items():
            self.tensors[name] = TensorInfo(adapter.files.shape(stored), adapter.files.code(stored))
        self.formed = frozenset(base.formed | adapter.factors.keys())
        problems = []
        for name in adapter.factors:
            shape = adapter.shape(name)
            if name not in self.tensors:
                problems.append(f"{name} is not in the base{_near(name, base.tensors)}")
            elif (info := self.tensors[name]).shape != shape:
                problems.append(
                    f"{name} is {list(info.shape)} in the base, {list(shape)} in the adapter"
                )
            elif info.code not in _ADAPTABLE:
                problems.append(
                    f"{name} is {info.code} in the base: pass a base without "
                    "quantization, or pass --dequantize"
                )
            else:
                self.tensors[name] = info._replace(code="F64" if info.code == "F64" else "F32")
        if problems:
            raise UserError(f"{adapter.directory} does not fit {base.label}: {'; '.join(problems)}")

    def _rename(self) -> None:
        """Map the adapter's names to those of the base if they differ by a prefix."""
        adapter = self.adapter
        shapes = {name: TensorInfo(shape, "F32") for name, shape in adapter.shapes().items()}
        mapped = renames(self.base.tensors, shapes, partial=True)
        if mapped.ambiguous:
            raise UserError(
                f"{adapter.directory}: {listed(mapped.ambiguous, 3)} match more than one "
                f"tensor of {self.base.label}"
            )
        if mapped.names:
            adapter.rename({adapter_name: name for name, adapter_name in mapped.names.items()})
            self.notes.append(note(str(adapter.directory), mapped))

    @property
    def tokenizer_directory(self) -> Path | None:
        """The directory of the adapter if it contains a tokenizer, else that of the base."""
        directory = self.adapter.directory
        names = ("tokenizer_config.json", "tokenizer.json")
        saved = any((directory / name).is_file() for name in names)
        return directory if saved else self.base.tokenizer_directory

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read, including those of the base."""
        directory = self.adapter.directory
        return (*self.base.files, directory / WEIGHTS, directory / CONFIG)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read elements [start, stop), as `Source.read`.

        Tensors with an update are float32, or float64 if the base is float64.
        """
        # An embedding may have both a replacement and an update.
        if name in self.adapter.replacements:
            weights = self.adapter.files.read(self.adapter.replacements[name], start, stop, out)
        else:
            weights = self.base.read(name, start, stop, out)
        if name not in self.adapter.factors:
            return weights
        adapted = weights.astype(np.float64) + self.adapter.delta(name, start, stop)
        return adapted.astype(np.promote_types(np.float32, weights.dtype))

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Do nothing: computed values are in no file."""

    def watch(self) -> None:
        """Do nothing: adapters are small compared with the base, so `checksums` reads them."""

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Return the checksums of the adapter's files, and of its base unless that is BASE."""
        directory = self.adapter.directory
        checksums = {} if self._shared_base else self.base.checksums(kind)
        return checksums | {
            name: f"{kind}:{checksum_file(directory / name, kind)}" for name in (CONFIG, WEIGHTS)
        }


def open_source(
    text: str,
    base: Source | None = None,
    read_as: Callable[[Source], Source] = lambda source: source,
) -> Source:
    """Open an input as the user typed it.

    | text | read as |
    |---|---|
    | a directory | safetensors in it: one file, or shards and their index |
    | a `.safetensors` file | its tensors |
    | `org/name`, `org/name@revision` | the same from the Hugging Face hub |
    | a directory with `adapter_config.json` | a LoRA adapter of BASE |
    | `model+adapter` | a LoRA adapter of that model; several adapters are added in order |

    Args:
      text: a path or a hub id, or several joined by `+`
      base: the model that a bare adapter is applied to; None when BASE itself is opened
      read_as: applied to a checkpoint as it is stored, before adapters (`quantization.as_weights`)

    Raises:
      UserError: the input does not exist or cannot be read; the message names it
    """
    text = os.path.expanduser(text)
    first, *adapters = [text] if Path(text).exists() else map(os.path.expanduser, text.split("+"))
    if not all((first, *adapters)):
        raise UserError(f"{text!r}: expected 'model+adapter'")
    text = "+".join((first, *adapters))
    source = base if base is not None and first == base.label else _open(first, base, read_as)
    for adapter in adapters:
        directory = resolve(adapter, PATTERNS)
        if not (directory / CONFIG).is_file():
            raise UserError(f"{adapter}: no {CONFIG}; pass a LoRA adapter's directory after '+'")
        source = AdaptedSource(text, source, Adapter(directory), shared_base=source is base)
    return source


def _open(text: str, base: Source | None, read_as: Callable[[Source], Source]) -> Source:
    path = _fetch(text)
    if not is_adapter(path):
        source = Source(text, path)
        _reject_adapter_files(source)
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            source.notes.append(
                f"{text}: {WEIGHTS} is not applied, because the directory also contains a "
                f"model; to apply the adapter to that model pass {text}+{text}"
            )
        if _COMMIT.fullmatch(path.name) and path != Path(text):
            source.notes.append(f"{text} is commit {path.name} on the hub")
        return read_as(source)
    if base is None:
        raise UserError(f"{text} is an adapter; as BASE pass the model that it was trained on")
    return AdaptedSource(text, base, Adapter(path), shared_base=True)


def _fetch(text: str) -> Path:
    """Return the path of a model; from the hub, also fetch the folders that its index lists."""
    if os.path.exists(text):
        return Path(text)
    path = resolve(text, _INDEXES)
    if _COMMIT.fullmatch(path.name):  # The branch can change in between.
        text = f"{text.partition('@')[0]}@{path.name}"
    pipeline = is_pipeline(path)
    inner = [name for name in named_folders(path) if name]
    return resolve(text, _OF_PIPELINES if pipeline else PATTERNS, inner)


def _reject_adapter_files(source: Source) -> None:
    """Raise an error if a file contains an adapter and no model."""
    if any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in source.tensors):
        raise UserError(
            f"{source.label}: LoRA files in kohya's format are not supported; convert "
            "the file to PEFT's format with diffusers (load_lora_weights, then "
            "save_lora_adapter), or merge it into its model first"
        )
    if other := next(filter(_OTHER_ADAPTER.search, source.tensors), None):
        raise UserError(
            f"{source.label}: an adapter in a format that is not supported ({other}); "
            "convert a LoRA to PEFT's format, or merge any other adapter into its model first"
        )
    factors = [name for name in source.tensors if ".lora_A." in name or ".lora_B." in name]
    if factors and len(factors) * 2 > len(source.tensors):
        raise UserError(
            f"{source.label}: an adapter's weights without its {CONFIG}; pass the "
            "directory that PEFT's save_pretrained wrote"
        )


def _hub_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file in the hub's cache, a link to `blobs/SHA256`, or None."""
    blob = path.resolve()
    is_blob = path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name)
    return blob.name if is_blob else None


def same_model(name: str, label: str) -> bool:
    """Return whether two names may mean one model; only the last part of a path is compared."""
    return Path(name.split("@")[0]).name == Path(label.split("@")[0]).name


def _near(name: str, names) -> str:
    """Return a hint with the base's name that an adapter's name most likely means."""
    tail = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return suggest(name, tail[:1] or names)


# Below: checkpoints with several components (pipelines, modules, a head) in separate files.


def folders(directory: Path) -> list[str]:
    """Return the folders of a directory that belong to its model; `''` is the directory itself.

    Raises:
      UserError: an index is invalid, or lists a folder outside of the directory
    """
    return [
        name for name in named_folders(directory) if not name or os.path.isdir(directory / name)
    ]


def named_folders(directory: Path) -> list[str]:
    """Return the folders that the index of a model lists, whether they exist or not.

    Raises:
      UserError: as `folders`
    """
    if (directory / PIPELINE).is_file():
        index = read_json(directory / PIPELINE)
        names = [""]
        names += (
            [key for key, value in index.items() if isinstance(value, list)]
            if isinstance(index, dict)
            else []
        )
    elif (directory / MODULES).is_file():
        index = read_json(directory / MODULES)
        modules = index if isinstance(index, list) else []
        names = [
            entry["path"]
            for entry in modules
            if isinstance(entry, dict) and isinstance(entry.get("path"), str)
        ]
        names = [
            "",
            *names,
            *(
                f"{name}/{inner}" if name else inner
                for name in names
                for inner in _routed(directory / name)
            ),
        ]
    else:
        return [""]
    names = ["" if name == "." else name.rstrip("/") for name in names]
    if outside := [n for n in names if Path(n).is_absolute() or ".." in Path(n).parts]:
        raise UserError(f"{directory}: {outside[0]!r} is not a folder of this model")
    return list(dict.fromkeys(names))


def _routed(module: Path) -> list[str]:
    """Return the folders in the folder of a sentence-transformers router."""
    if not (module / ROUTER).is_file():
        return []
    config = read_json(module / ROUTER)
    types = config.get("types") if isinstance(config, dict) else None
    return list(types) if isinstance(types, dict) else []


def tokenizer_folders(directory: Path) -> list[str]:
    """Return the folders of a model that contain a tokenizer, or `['']` if none does.

    Example:
      >>> tokenizer_folders(Path("/nowhere"))
      ['']
    """
    with_tokenizer = [
        name
        for name in folders(directory)
        if any((directory / name / file).is_file() for file in TOKENIZERS)
    ]
    return with_tokenizer or [""]


def is_pipeline(directory: Path | None) -> bool:
    """Return whether a directory is a diffusers pipeline."""
    return directory is not None and (directory / PIPELINE).is_file()


def open_all(path: Path) -> dict[str, tuple[str, TensorFiles]]:
    """Open the weight files of a checkpoint.

    Args:
      path: a directory or a `.safetensors` file

    Returns:
      prefix of a tensor name -> (stem of the output file, the tensors)

    Raises:
      UserError: there are no weights, or a file cannot be read
    """
    if not path.is_dir():
        return {"": ("model", TensorFiles(path))}
    opened: dict[str, tuple[str, TensorFiles]] = {}
    for folder in _weight_folders(path):
        files = TensorFiles(path / folder)
        prefix = f"{folder}/" if folder else ""
        opened[prefix] = (prefix + files.stem, files)
    if not opened:
        return {"": ("model", TensorFiles(path))}
    head = path / HEAD
    model = opened.get("")
    if model and head.is_file() and head not in model[1].files.values():
        opened[HEAD_PREFIX] = (HEAD.removesuffix(".safetensors"), TensorFiles(head))
    return opened


def stored_name(name: str, components: Mapping[str, str]) -> str:
    """Return the name of a tensor in its file.

    Example:
      >>> stored_name("unet/conv.weight", {"unet/": "unet/model"})
      'conv.weight'
    """
    return name[len(prefix_of(name, components)) :]


def prefix_of(name: str, components: Mapping[str, str]) -> str:
    """Return the prefix of the component that a tensor name belongs to."""
    return max((prefix for prefix in components if name.startswith(prefix)), key=len, default="")


def _weight_folders(directory: Path) -> list[str]:
    """Return the folders with weights.

    The top folder of a pipeline is left out: it may contain the weights in another format.
    """
    names = folders(directory)
    if len(names) == 1:
        return names
    if (directory / PIPELINE).is_file() or not _is_module(directory, ""):
        names = [name for name in names if name]
    return [name for name in names if _has_weights(directory / name)]


def _is_module(directory: Path, folder: str) -> bool:
    """Return whether `modules.json` lists a folder as a separate module."""
    index = read_json(directory / MODULES)
    return any(
        isinstance(entry, dict) and entry.get("path") in (folder, folder or ".")
        for entry in (index if isinstance(index, list) else [])
    )


def _has_weights(folder: Path) -> bool:
    return any(
        path.suffix == ".safetensors"
        or path.suffix in _OTHER_WEIGHTS
        or ".safetensors.index." in path.name
        for path in folder.iterdir()
        if not path.name.startswith(".")
    )
