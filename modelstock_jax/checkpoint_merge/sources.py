"""What a merge reads: a checkpoint's tensors by name and range, wherever they come from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from modelstock_jax.checkpoint_merge.lora import CONFIG, WEIGHTS, Adapter, is_adapter
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo, note, renames
from modelstock_jax.errors import UserError, listed, near
from modelstock_jax.merging.anchor_rounding import half_ulp_square
from modelstock_jax.tensor_files.checksums import RangeChecksum, checksum_file
from modelstock_jax.tensor_files.hub import resolve
from modelstock_jax.tensor_files.reader import DTYPES, HEAD, PICKLES, TensorFiles, read_json

PIPELINE, MODULES = "model_index.json", "modules.json"
ROUTER = "router_config.json"
# One of these is in the directory of every tokenizer.
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
# Weights in other formats: opened, so that the error names them.
_OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".gguf")
HEAD_PREFIX = f"{HEAD}:"
# What a model needs beside its tensors, by how names end and begin; never pickles, never code.
ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
LICENSES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
PATTERNS = ("*.safetensors", *(f"*{end}" for end in ENDINGS), *(f"{name}*" for name in LICENSES))
# Read first: they name a model's folders.
_INDEXES = (PIPELINE, MODULES, ROUTER)
# Next to a pipeline's index there may be the same model in one large file of another format.
_OF_PIPELINES = (
    *(f"{stem}*.safetensors" for stem in ("model", "diffusion_pytorch_model")),
    *PATTERNS[1:],
)
_SHA256, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
# Factors by the names of diffusers' first releases, LyCORIS, XLabs and IA3.
_OTHER_ADAPTER = re.compile(
    r"(?:^|[._])lora\d?\.(?:down|up)\.|\.hada_w\d|\.lokr_w\d|\.ia3_l\b|\.oft_(?:r|blocks)\b"
)
_FORMABLE = ("BF16", "F16", "F32", "F64")


class Source:
    """A checkpoint in safetensors.

    Attributes:
      label: what the user typed.
      directory: where config and tokenizer files lie; None for a single file.
      tensors: name -> `TensorInfo`.
      components: prefix of a tensor's name -> stem of its output file (`components`).
      aliases: name -> the tensor that it is another name of, by a file's `__metadata__`.
      notes: what a reader of the report should know about this input.
      formed: names of tensors that are computed, not stored: reading one costs arithmetic.
    """

    def __init__(self, label: str, path: Path):
        self.label = label
        self.directory = path if path.is_dir() else None
        opened = open_all(path)
        self.components = {prefix: stem for prefix, (stem, _) in opened.items()}
        self._stored = {
            prefix + own: (files, own) for prefix, (_, files) in opened.items() for own in files
        }
        self.aliases = {
            prefix + name: prefix + kept
            for prefix, (_, files) in opened.items()
            for name, kept in files.aliases.items()
        }
        self.tensors = {
            name: TensorInfo(files.shape(own), files.code(own))
            for name, (files, own) in self._stored.items()
        }
        self.notes: list[str] = []
        self.formed: frozenset[str] = frozenset()
        self._watched: dict[Path, RangeChecksum] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(sorted({files.files[own] for files, own in self._stored.values()}))

    @property
    def tokenizer_directory(self) -> Path | None:
        """Where tokenizer files are: next to the model."""
        return self.directory

    @property
    def num_bytes(self) -> int:
        """Size of the files that are read."""
        return sum(path.stat().st_size for path in self.files)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor, in its stored dtype; thread-safe.

        They are read into the bytes `into` where those are given, which saves fresh memory.
        """
        files, own = self._stored[name]
        return files.read(own, start, stop, out)

    def stored_dtype(self, name: str) -> np.dtype:
        """Dtype in which a tensor's numbers are stored: how fine they are."""
        return DTYPES[self.tensors[name].code]

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Largest squared rounding error of each of the elements [start, stop), float64."""
        return half_ulp_square(self.read(name, start, stop))

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Takes numbers that were read into their file's digest, if `watch` asked for that."""
        if self._watched:
            files, own = self._stored[name]
            file, place = files.file_offset(own, start)
            if (digest := self._watched.get(file)) is not None:
                digest.update(place, values.view(np.uint8).data)

    def watch(self) -> None:
        """Takes the CRC-32 of what passes by from here on, for `digests`."""
        self._watched = {
            path: RangeChecksum(path.stat().st_size)
            for path in self.files
            if _hub_sha256(path) is None
        }

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Checksum of each file as `kind:digits`, by its path; what did not pass by is read."""
        found = {}
        for path in self.files:
            if named := _hub_sha256(path):
                digest = f"sha256:{named}"
            elif kind == "crc32" and path in self._watched:
                digest = f"{kind}:{self._watched[path].complete(path)}"
            else:
                digest = f"{kind}:{checksum_file(path, kind)}"
            found[self._shown(path)] = digest
        return found

    def _shown(self, path: Path) -> str:
        """A file's path in the model's directory: files of two components may have one name."""
        if self.directory is None or not path.is_relative_to(self.directory):
            return path.name
        return path.relative_to(self.directory).as_posix()


class AdaptedSource(Source):
    """A base and a LoRA adapter of it: W + s B A, formed for the range that is asked for."""

    def __init__(self, label: str, base: Source, adapter: Adapter, *, shared_base: bool = False):
        self.label, self.directory = label, base.directory
        self.base, self.adapter, self._shared_base = base, adapter, shared_base
        self.components, self.aliases = base.components, base.aliases
        self.tensors = dict(base.tensors)
        self.notes = [] if shared_base else list(base.notes)
        if adapter.base and not _same_model(adapter.base, base.label):
            self.notes.append(
                f"{adapter.directory} was made for {adapter.base!r} and is applied to {base.label}"
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
            elif (found := self.tensors[name]).shape != shape:
                problems.append(f"{name} is {list(found.shape)} in the base, {list(shape)} here")
            elif found.code not in _FORMABLE:
                problems.append(
                    f"{name} is {found.code} in the base: give it without "
                    "quantization, or pass --dequantize"
                )
            else:
                self.tensors[name] = found._replace(code="F64" if found.code == "F64" else "F32")
        if problems:
            raise UserError(f"{adapter.directory} does not fit {base.label}: {'; '.join(problems)}")

    def _rename(self) -> None:
        """Maps the adapter's names onto the base's where these differ by a prefix."""
        adapter = self.adapter
        shapes = {name: TensorInfo(adapter.shape(name), "F32") for name in adapter.factors}
        shapes |= {
            name: TensorInfo(adapter.files.shape(stored), "F32")
            for name, stored in adapter.replacements.items()
            if name not in shapes
        }
        found = renames(self.base.tensors, shapes, partial=True)
        if found.ambiguous:
            raise UserError(
                f"{adapter.directory}: {listed(found.ambiguous, 3)} fit more than one "
                f"tensor of {self.base.label}"
            )
        if found.names:
            adapter.rename({own: name for name, own in found.names.items()})
            self.notes.append(note(str(adapter.directory), found))

    @property
    def tokenizer_directory(self) -> Path | None:
        """Next to the adapter where a training has saved one there; else the base's."""
        own = self.adapter.directory
        saved = any((own / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
        return own if saved else self.base.tokenizer_directory

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read, the base's too."""
        own = self.adapter.directory
        return (*self.base.files, own / WEIGHTS, own / CONFIG)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop); float32 (float64 for a float64 base) where they are formed."""
        if name in self.adapter.replacements:  # An embedding may be both: held whole, and moved.
            weights = self.adapter.files.read(self.adapter.replacements[name], start, stop, out)
        else:
            weights = self.base.read(name, start, stop, out)
        if name not in self.adapter.factors:
            return weights
        formed = weights.astype(np.float64) + self.adapter.delta(name, start, stop)
        return formed.astype(np.promote_types(np.float32, weights.dtype))

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Nothing: what is formed is no file's."""

    def watch(self) -> None:
        """Nothing: its files are small beside its base's, and read for their digests alone."""

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Digests of the adapter's files, and of its base's where that is not BASE itself."""
        own = self.adapter.directory
        digests = {} if self._shared_base else self.base.checksums(kind)
        return digests | {
            name: f"{kind}:{checksum_file(own / name, kind)}" for name in (CONFIG, WEIGHTS)
        }


def open_source(
    text: str,
    base: Source | None = None,
    read_as: Callable[[Source], Source] = lambda source: source,
) -> Source:
    """Opens an input as it is typed.

    | text | read as |
    |---|---|
    | a directory | safetensors in it: one file, or shards and their index |
    | a `.safetensors` file | its tensors |
    | `org/name`, `org/name@revision` | the same from the Hugging Face hub |
    | a directory with `adapter_config.json` | a LoRA adapter of BASE |
    | `model+adapter` | a LoRA adapter of that model; several are added in turn |

    Args:
      text: a path or a hub id, or several joined by `+`.
      base: what a bare adapter is applied to; None when BASE itself is opened.
      read_as: of a checkpoint as it is stored, before adapters (`quantization.as_weights`).

    Raises:
      UserError: there is no such thing, or it cannot be read; it names it.
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
            raise UserError(f"{adapter}: no {CONFIG}; after '+' comes a LoRA adapter's directory")
        source = AdaptedSource(text, source, Adapter(directory), shared_base=source is base)
    return source


def _open(text: str, base: Source | None, read_as: Callable[[Source], Source]) -> Source:
    path = _fetch(text)
    if not is_adapter(path):
        source = Source(text, path)
        _refuse_adapter_files(source)
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            source.notes.append(
                f"{text}: {WEIGHTS} is not applied, for the directory holds a "
                f"model too; to apply the adapter to that model give {text}+{text}"
            )
        if _COMMIT.fullmatch(path.name) and path != Path(text):
            source.notes.append(f"{text} is commit {path.name} on the hub")
        return read_as(source)
    if base is None:
        raise UserError(f"{text} is an adapter; as BASE give the model that it was trained on")
    return AdaptedSource(text, base, Adapter(path), shared_base=True)


def _fetch(text: str) -> Path:
    """The path of a model; of a pipeline or modules on the hub the folders that its index names."""
    if os.path.exists(text):
        return Path(text)
    path = resolve(text, _INDEXES)
    if _COMMIT.fullmatch(path.name):  # The branch may move meanwhile.
        text = f"{text.partition('@')[0]}@{path.name}"
    pipeline = is_pipeline(path)
    inner = [name for name in named_folders(path) if name]
    return resolve(text, _OF_PIPELINES if pipeline else PATTERNS, inner)


def _refuse_adapter_files(source: Source) -> None:
    """Names files that hold an adapter and no model."""
    if any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in source.tensors):
        raise UserError(
            f"{source.label}: a LoRA file in kohya's format is not read; convert "
            "it to PEFT's with diffusers (load_lora_weights, then save_lora_adapter), "
            "or merge it into its model first"
        )
    if found := next(filter(_OTHER_ADAPTER.search, source.tensors), None):
        raise UserError(
            f"{source.label}: an adapter in a format that is not read ({found}); "
            "convert a LoRA to PEFT's format, merge any other into its model first"
        )
    factors = [name for name in source.tensors if ".lora_A." in name or ".lora_B." in name]
    if factors and len(factors) * 2 > len(source.tensors):
        raise UserError(
            f"{source.label}: an adapter's weights without its {CONFIG}; give the "
            "directory that PEFT's save_pretrained wrote"
        )


def _hub_sha256(path: Path) -> str | None:
    """SHA-256 by which the hub's cache names a file's content; a link into `blobs` leads to it."""
    blob = path.resolve()
    named = path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name)
    return blob.name if named else None


def _same_model(name: str, label: str) -> bool:
    """Whether two names may mean one model: a path's last part says enough."""
    return Path(name.split("@")[0]).name == Path(label.split("@")[0]).name


def _near(name: str, names) -> str:
    """The base's name that the adapter's most likely means."""
    tail = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return near(name, tail[:1] or names)


# Checkpoints of several weight files with a folder or a role each: pipelines, modules, a head.


def folders(directory: Path) -> list[str]:
    """Folders of a directory that belong to its model; `''` is the directory itself.

    Raises:
      UserError: An index that is broken, or names a folder outside of the directory.
    """
    return [
        name for name in named_folders(directory) if not name or os.path.isdir(directory / name)
    ]


def named_folders(directory: Path) -> list[str]:
    """The folders that a model's index names, whether they exist or not.

    Raises:
      UserError: As `folders`.
    """
    if (directory / PIPELINE).is_file():
        index = read_json(directory / PIPELINE)
        found = [""]
        found += (
            [key for key, value in index.items() if isinstance(value, list)]
            if isinstance(index, dict)
            else []
        )
    elif (directory / MODULES).is_file():
        index = read_json(directory / MODULES)
        modules = index if isinstance(index, list) else []
        found = [
            entry["path"]
            for entry in modules
            if isinstance(entry, dict) and isinstance(entry.get("path"), str)
        ]
        found = [
            "",
            *found,
            *(
                f"{name}/{inner}" if name else inner
                for name in found
                for inner in _routed(directory / name)
            ),
        ]
    else:
        return [""]
    found = ["" if name == "." else name.rstrip("/") for name in found]
    if outside := [n for n in found if Path(n).is_absolute() or ".." in Path(n).parts]:
        raise UserError(f"{directory}: {outside[0]!r} is no folder of this model")
    return list(dict.fromkeys(found))


def _routed(module: Path) -> list[str]:
    """Folders in the folder of a sentence-transformers router."""
    if not (module / ROUTER).is_file():
        return []
    config = read_json(module / ROUTER)
    types = config.get("types") if isinstance(config, dict) else None
    return list(types) if isinstance(types, dict) else []


def tokenizer_folders(directory: Path) -> list[str]:
    """Folders of a model with a tokenizer; the directory itself where none has one.

    Example:
      >>> tokenizer_folders(Path("/nowhere"))
      ['']
    """
    found = [
        name
        for name in folders(directory)
        if any((directory / name / file).is_file() for file in TOKENIZERS)
    ]
    return found or [""]


def is_pipeline(directory: Path | None) -> bool:
    """Whether a directory is a diffusers pipeline."""
    return directory is not None and (directory / PIPELINE).is_file()


def open_all(path: Path) -> dict[str, tuple[str, TensorFiles]]:
    """The weight files of a checkpoint: prefix of a tensor's name -> output stem, and the files.

    Args:
      path: A directory, or a `.safetensors` file.

    Raises:
      UserError: No weights, or a file that cannot be read.
    """
    if not path.is_dir():
        return {"": ("model", TensorFiles(path))}
    found: dict[str, tuple[str, TensorFiles]] = {}
    for folder in _weight_folders(path):
        place = path / folder
        files = TensorFiles(place)
        prefix = f"{folder}/" if folder else ""
        found[prefix] = (prefix + files.stem, files)
    if not found:
        return {"": ("model", TensorFiles(path))}
    beside = path / HEAD
    model = found.get("")
    if model and beside.is_file() and beside not in model[1].files.values():
        found[HEAD_PREFIX] = (HEAD.removesuffix(".safetensors"), TensorFiles(beside))
    return found


def stored_name(name: str, components: Mapping[str, str]) -> str:
    """A tensor's name in its own file.

    Example:
      >>> stored_name("unet/conv.weight", {"unet/": "unet/model"})
      'conv.weight'
    """
    return name[len(prefix_of(name, components)) :]


def prefix_of(name: str, components: Mapping[str, str]) -> str:
    """The component that a planned name belongs to, by its prefix."""
    return max((prefix for prefix in components if name.startswith(prefix)), key=len, default="")


def _weight_folders(directory: Path) -> list[str]:
    """Folders with weights; the top folder of a pipeline may hold them in another layout."""
    parts = folders(directory)
    if len(parts) == 1:
        return parts
    if (directory / PIPELINE).is_file() or not _is_module(directory, ""):
        parts = [name for name in parts if name]
    return [name for name in parts if _has_weights(directory / name)]


def _is_module(directory: Path, folder: str) -> bool:
    """Whether `modules.json` names a folder as a module of its own."""
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
