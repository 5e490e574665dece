"""What a model directory holds, told from its config.json and the headers of its files.

No torch here: `cadre plan` reads models on machines that could not hold them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cadre.errors import UsageError, one_line, read_error, write_error
from cadre.files import kind_of, read_json_object, require_regular
from cadre.model.config import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: safetensors' name of its dtype, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def model_directory(path: str | Path) -> Path:
    """The Hugging Face directory that `path` means: itself, or the `model/` of a run directory.

    If a crash hit `save` between its two renames, the model it was replacing is found where that moment left it, and
    stays there, since reading writes nothing: `recover` puts it back.
    Raises `UsageError` if there is no config.json in any of these places.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        for candidate in (folder, set_aside(folder)):
            if kind_of(candidate / "config.json") == "file":
                return candidate
    there = kind_of(path)
    if there == "folder":
        raise UsageError(f"{path}: is no model directory: no config.json")
    if there == "file" and path.suffix == ".gguf":
        raise UsageError(f"{path}: is no model directory: make one of it with cadre convert {path} DIR")
    if not there and len(path.parts) == 2 and not path.is_absolute() and kind_of(path.parent) is None:  # a name on the Hub
        raise UsageError(f"{path}: is no model directory: no such folder; to fetch it: hf download {path} --local-dir DIR")
    raise UsageError(f"{path}: is no model directory: {'not a folder' if there else 'no such folder'}")


def run_of(path: Path) -> Path | None:
    """The run directory that a model's path means: itself or that whose `model/` or `best/` it is; None of another model."""
    if kind_of(path / "recipe.toml") == "file":
        return path
    path = path.resolve()
    in_run = path.name in ("model", "best") and kind_of(path.parent / "recipe.toml") == "file"
    return path.parent if in_run else None


def display_name(path: str | Path) -> str:
    """What to call a model: its run's name, else its folder's."""
    path = Path(path)
    return (run_of(path) or path).resolve().name


def set_aside(folder: Path) -> Path:
    """Where `save` keeps the old model for the moment between its two renames."""
    return _hidden(folder, "old")


def in_making(folder: Path) -> Path:
    """Where `save` writes before it renames."""
    return _hidden(folder, "new")


def recover(path: Path) -> None:
    """Put a model back in its place that a crash in `save` left aside. For who is about to write there: who only reads finds it
    where it lies. Raises `RunError` if it cannot be moved."""
    target, old = path.resolve(), set_aside(path)
    try:
        if old.exists() and not target.exists():
            old.rename(target)
    except OSError as error:
        raise write_error(f"{target}: cannot be moved here from {old.name}, where a crash left it", error) from None


def _hidden(folder: Path, state: str) -> Path:
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.{state}"


def load_config(path: str | Path) -> ModelConfig:
    """The config of a model directory, a run directory or a `config.json` file.

    Of a directory with weights it is the config of the model that `load` gives (see `without_absent_modules`). Raises
    `UsageError` if there is none, or none that Cadre can build.
    """
    path = Path(path)
    if kind_of(path) == "file":
        return ModelConfig.from_file(path)
    directory = model_directory(path)
    config = config_with_eos(directory)
    if config.num_nextn_predict_layers and _named(directory, ".safetensors"):
        config = without_absent_modules(config, stored_tensors(directory))
    return config


def config_with_eos(directory: Path) -> ModelConfig:
    """The config of a model directory with every `eos_token_id` that its two files name: transformers ends a text at the ids of
    `generation_config.json`, often more than `config.json` has (of turns in a chat), and so do we.

    Raises `UsageError` for a file that is missing or damaged.
    """
    config = ModelConfig.from_file(directory / "config.json")
    file = directory / "generation_config.json"
    if kind_of(file) is None:
        return config
    values = read_json_object(file)
    stored = values.get("eos_token_id")
    named = stored if isinstance(stored, list) else [] if stored is None else [stored]
    for token in named:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise UsageError(f"{file}: eos_token_id is {token!r}; it must be a token id from 0 to {config.vocab_size - 1}")
    return ending_at(config, named)


def ending_at(config: ModelConfig, tokens: list[int]) -> ModelConfig:
    """The config with these tokens too among those that end a text."""
    further = [token for token in tokens if token not in config.end_tokens]
    return config.model_copy(update={"eos_token_id": config.end_tokens + further}) if further else config


def without_absent_modules(config: ModelConfig, stored: dict[str, Stored]) -> ModelConfig:
    """The config without multi-token prediction where no module's tensor is stored: transformers announces the modules
    (one by default) but never saves them."""
    if not config.num_nextn_predict_layers or modules_stored(config.num_hidden_layers, stored):
        return config
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    return config.model_copy(update={"num_nextn_predict_layers": 0, "first_k_dense_replace": dense})


def lacks_modules(path: Path, num_hidden_layers: int) -> bool:
    """Whether a path is a model directory with weights of the layers alone, and of no module of multi-token prediction; False
    where that cannot be told, as of files that are still to be fetched."""
    if kind_of(path) != "folder":
        return False
    try:
        directory = model_directory(path)
        indexed = kind_of(directory / WEIGHTS) is None and kind_of(directory / INDEX) is not None
        names = read_json_object(directory / INDEX).get("weight_map") if indexed else stored_tensors(directory)
    except UsageError:
        return False
    layers = _layers(names if isinstance(names, dict) else {})
    return 0 in layers and max(layers) < num_hidden_layers


def modules_stored(num_hidden_layers: int, stored: dict[str, Stored]) -> list[int]:
    """The layer numbers beyond `num_hidden_layers` under which tensors are stored, in order."""
    return sorted(layer for layer in _layers(stored) if layer >= num_hidden_layers)


def _layers(names: Iterable[str]) -> set[int]:
    parts = (name.split(".") for name in names if name.startswith("model.layers."))
    # A number of more digits is no layer of any model; Python would not read thousands of them.
    return {int(part[2]) for part in parts if part[2].isdecimal() and len(part[2]) < 10}


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory by name, from its safetensors files' headers.

    Raises `UsageError` naming the file: none but pickle files, a missing shard, a damaged file, a tensor in two files.
    """
    single, index = kind_of(directory / WEIGHTS), kind_of(directory / INDEX)
    placed = _index(directory) if single is None and index is not None else {}
    files = [directory / name for name in sorted(set(placed.values()))] if placed else [_single(directory)]
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in stored:
                raise UsageError(f"{directory}: {name} is in both {stored[name].file.name} and {file.name}")
            stored[name] = tensor
    for name, file_name in placed.items():
        if name not in stored or stored[name].file.name != file_name:
            raise UsageError(f"{directory / INDEX}: {name} should be in {file_name}, but is not")
    return stored


def _single(directory: Path) -> Path:
    if kind_of(directory / WEIGHTS) is not None:
        return directory / WEIGHTS
    found = _named(directory, ".safetensors")
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{directory}: holds {len(found)} safetensors files, but no {INDEX} that joins them")
    pickles = _named(directory, *_PICKLES)
    if pickles:
        raise UsageError(f"{pickles[0]}: pickle files can run code; Cadre loads safetensors only")
    raise UsageError(f"{directory}: holds a config.json but no weights: no {WEIGHTS}")


def _named(directory: Path, *suffixes: str) -> list[Path]:
    """What lies in a folder under names of these endings, in order."""
    try:
        return sorted(file for file in directory.iterdir() if file.suffix in suffixes)
    except OSError as error:
        raise read_error(directory, error) from None


def _index(directory: Path) -> dict[str, str]:
    """Which file holds each tensor. File names must be plain: an index must not reach outside its directory."""
    path = directory / INDEX
    values = read_json_object(path)
    try:
        placed = values["weight_map"]
        names = set(placed.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read as an index of safetensors files ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{path}: {name!r} is not the name of a safetensors file beside it")
        if kind_of(directory / name) is None:
            raise UsageError(f"{directory}: {name} is missing, though {INDEX} lists it")
    if not names:
        raise UsageError(f"{path}: lists no tensors")
    return placed


def _header(file: Path) -> dict[str, Stored]:
    require_regular(file)
    try:
        file.open("rb").close()  # the library takes whatever it may not read for missing
    except OSError as error:
        raise read_error(file, error) from None
    # Opening checks that the header is sound and that it covers the file's bytes exactly.
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, no mapping
            return {name: Stored(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file}: truncated, damaged or no safetensors file ({one_line(error)})") from None
