"""Any diffusers text-to-image pipeline, from a hub id, a folder, a single file or the package's own assets.

Weights come from safetensors, or from pickles read with ``weights_only``; code in a model is never run.
"""

import contextlib
import copy
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from t2iprobe.cpu_layers import suit_cpu
from t2iprobe.devices import best_device, best_dtype, lower_weights, resolve_dtype
from t2iprobe.errors import UserError, suggest
from t2iprobe.storage import hash_files

if TYPE_CHECKING:
    import torch

__all__ = [
    "Pipeline",
    "accepted_arguments",
    "best_device",
    "best_dtype",
    "load_pipeline",
    "locate_model",
    "model_hash",
    "place_pipeline",
    "read_scheduler",
    "resolve_dtype",
    "setting_arguments",
]

# A diffusers.DiffusionPipeline: to a type checker its classes are stand-ins without attributes.
Pipeline = Any
EMBEDDED = "embedded"
# Not used by a probe: a black picture in place of a judged one would be a wrong answer.
UNUSED_COMPONENTS = ("safety_checker", "feature_extractor")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CONTENT = (".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SINGLE_FILE_CLASSES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "auraflow": "AuraFlowPipeline",
    "chroma": "ChromaPipeline",
    "lumina2": "Lumina2Pipeline",
    "sana": "SanaPipeline",
}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: a pipeline folder, or a file and perhaps a folder of its configurations."""

    folder: Path | None
    file: Path | None = None


def locate_model(model: str, *, variant: str | None = None, download: bool = True) -> ModelFiles:
    """Find a model's files: ``embedded``, a folder, ``FILE`` or ``FILE@FOLDER``, a hub id ``ORG/NAME[@REV]``.

    A hub id is downloaded, or with ``download=False`` looked up among what was downloaded before.
    Raises UserError where there is nothing, or a folder that is not a pipeline's.
    """
    if model == EMBEDDED:
        folder = Path(str(files("t2iprobe"))) / "assets" / "embedded_model"
        if not (folder / "model_index.json").exists():
            raise UserError(
                "this copy of t2iprobe carries no embedded model: give --model FOLDER or a hub id"
            )
        return ModelFiles(folder)
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelFiles(_check_folder(path))
    if path.is_file():
        return ModelFiles(None, path)
    file, _, configuration = model.rpartition("@")
    if file and Path(file).expanduser().is_file():
        return ModelFiles(_check_folder(Path(configuration).expanduser()), Path(file).expanduser())
    if not _HUB_ID.fullmatch(model) or path.suffix in _CONTENT:
        raise UserError(
            f"there is no model {model!r}: give 'embedded', a folder with model_index.json, "
            "a single weights file, or a hub id ORG/NAME"
        )
    return ModelFiles(_find_hub_folder(model, variant, download))


def _check_folder(folder: Path) -> Path:
    if not (folder / "model_index.json").is_file():
        inside = sorted(folder.glob("*/model_index.json"))
        hint = f" ({inside[0].parent} has one)" if inside else ""
        raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json{hint}")
    return folder


def _find_hub_folder(model: str, variant: str | None, download: bool) -> Path:
    name, _, revision = model.partition("@")
    if not download:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(f"{model} has not been downloaded") from None
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _quiet_libraries():
            return Path(DiffusionPipeline.download(name, revision=revision or None, variant=variant))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"cannot get {model!r} from the hub ({first_line(error)}): check the name and the network, "
            "accept the model's terms there if it has any, or give a folder"
        ) from None


def load_pipeline(
    model: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    variant: str | None = None,
    scheduler: str | None = None,
) -> Pipeline:
    """Load a pipeline, place it on `device` in `dtype` (see `place_pipeline`) and silence its progress bar.

    `variant` names weight files such as ``*.fp16.safetensors``; `scheduler` replaces the model's own.
    Raises UserError where the model cannot be found or loaded.
    """
    import torch

    device = device or best_device()
    dtype = resolve_dtype(dtype, device)
    # On a CPU weights are loaded whole: what is lowered there is chosen by `place_pipeline`.
    loaded_as = torch.float32 if device == "cpu" and dtype == "bfloat16" else getattr(torch, dtype)
    source = locate_model(model, variant=variant)
    try:
        with _quiet_libraries():
            if source.file is not None:
                pipeline = _load_single_file(source, loaded_as)
            else:
                assert source.folder is not None
                pipeline = _load_folder(source.folder, loaded_as, variant)
            if scheduler:
                replace_scheduler(pipeline, find_scheduler(scheduler), pipeline.scheduler.config)
            place_pipeline(pipeline, device, dtype)
    except _BROKEN as error:
        alone = source.file is not None and source.folder is None
        hint = f"; where its configurations cannot be had, give {model}@FOLDER with them" if alone else ""
        raise UserError(f"cannot load the model {model!r}: {first_line(error)}{hint}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# What diffusers and transformers raise of files that are not theirs: safetensors' own error is no OSError.
_BROKEN = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    KeyError,
    SafetensorError,
)


def find_scheduler(name: str) -> Any:
    """Return diffusers' scheduler class of that name. Raises UserError, with near names."""
    import diffusers

    names = [known for known in dir(diffusers) if known.endswith("Scheduler")]
    if name not in names:
        raise UserError(f"diffusers has no scheduler {name!r}{suggest(name, names)}")
    return getattr(diffusers, name)


def replace_scheduler(pipeline: Pipeline, kind: Any, configuration: Any) -> None:
    """Let a pipeline draw by a scheduler class, set up by another one's configuration.

    Of two stages, such as Kandinsky's, the decoder draws by it. Raises UserError where it cannot be set up.
    """
    try:
        scheduler = kind.from_config(configuration)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__} cannot draw here: {first_line(error)}") from None
    pipeline.scheduler = scheduler
    if (decoder := getattr(pipeline, "decoder_pipe", None)) is not None:
        decoder.scheduler = scheduler


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence the loading bars and advice of diffusers and transformers for a while."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()


def _load_folder(folder: Path, dtype: "torch.dtype", variant: str | None) -> Pipeline:
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    index = read_model_index(folder)
    arguments: dict[str, Any] = {name: None for name in UNUSED_COMPONENTS if name in index}
    if "requires_safety_checker" in index:
        arguments["requires_safety_checker"] = False
    if variant or _has_only_variant(folder):
        arguments["variant"] = variant or "fp16"
    arguments |= {"dtype": dtype, "local_files_only": True}
    try:
        return AutoPipelineForText2Image.from_pretrained(str(folder), **arguments)
    except ValueError as error:
        if "can't find a pipeline linked to" not in str(error):
            raise
    return DiffusionPipeline.from_pretrained(str(folder), **arguments)


def _has_only_variant(folder: Path) -> bool:
    weights = [path.name for path in folder.glob("*/*.safetensors")]
    return bool(weights) and all(".fp16." in name for name in weights)


def _load_single_file(source: ModelFiles, dtype: "torch.dtype") -> Pipeline:
    import diffusers

    assert source.file is not None
    arguments: dict[str, Any] = {"dtype": dtype}
    if source.folder is not None:
        name = read_model_index(source.folder)["_class_name"]
        arguments |= {"config": str(source.folder), "local_files_only": True}
    else:
        name = _infer_single_file_class(source.file)
    pipeline_class = getattr(diffusers, name)
    if "safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
        arguments |= {"safety_checker": None, "requires_safety_checker": False}
    return pipeline_class.from_single_file(str(source.file), **arguments)


def _infer_single_file_class(file: Path) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(file)))
    if kind not in _SINGLE_FILE_CLASSES:
        raise UserError(
            f"{file} looks like a {kind!r} checkpoint, for which no text-to-image pipeline is known: "
            f"give {file}@FOLDER, where FOLDER holds the model_index.json and configurations of its pipeline"
        )
    return _SINGLE_FILE_CLASSES[kind]


def read_model_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline folder's model_index.json. Raises UserError where it is not one."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'model_index.json'} is damaged: it names no pipeline class") from None
    return index


def place_pipeline(pipeline: Pipeline, device: str, dtype: str) -> None:
    """Move a pipeline to `device` and lower it to `dtype`, in place.

    bfloat16 on a CPU is meant for `inference_context`: only the weights of convolutions and linear layers are
    lowered, so that autocast has nothing left to cast at each step. Norms, the text encoders (run once a
    prompt) and the latents between steps stay in float32.

    Elsewhere networks that were loaded in `dtype` are left as they are, since some keep layers in float32
    that would overflow (T5's). So does SDXL's autoencoder in float16, as a whole.
    """
    import torch

    networks = {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
    }
    lowered = [n for name, n in networks.items() if not name.startswith(("text_encoder", "bert"))]
    on_cpu = device == "cpu"
    if on_cpu and dtype == "bfloat16":
        for component in lowered:
            lower_weights(component, torch.bfloat16)
            suit_cpu(component)
    else:
        pipeline.to(device)
        for component in networks.values():
            wanted = getattr(torch, dtype)
            if all(each.dtype != wanted for each in component.parameters()):
                component.to(wanted)
        if dtype == "float16" and hasattr(pipeline, "upcast_vae") and pipeline.vae.config.force_upcast:
            _keep_in_float32(pipeline.vae)
    for component in lowered:
        if device.startswith("cuda") or (on_cpu and dtype == "bfloat16"):
            _put_channels_last(component)
        component.requires_grad_(False)


def _keep_in_float32(autoencoder: "torch.nn.Module") -> None:
    """Let an autoencoder compute in float32, whatever it is given.

    diffusers would cast it to and fro in each call, which also disturbs calls at the same time.
    """

    def raise_input(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0].float(), *given[1:])

    autoencoder.float()
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        if (part := getattr(autoencoder, name, None)) is not None:
            part.register_forward_pre_hook(raise_input)


def _put_channels_last(network: "torch.nn.Module") -> None:
    """Lay out the weights of two-dimensional convolutions; torch refuses those of three dimensions."""
    import torch

    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def accepted_arguments(pipeline: Pipeline, **wanted: Any) -> dict[str, Any]:
    """Return those of `wanted` that the pipeline's call takes."""
    accepted = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


def default_steps(pipeline: Pipeline) -> int | None:
    """Return how many steps the pipeline's call takes by default, None where it does not say."""
    known = inspect.signature(pipeline.__call__).parameters
    defaults = [known[name].default for names in _STEPS for name in names if name in known]
    return next((count for count in defaults if isinstance(count, int)), None)


# In order of preference; every name of the first group that the call takes is given the value.
_GUIDANCE = (("prior_guidance_scale", "decoder_guidance_scale", "guidance_scale"), ("true_cfg_scale",))
_STEPS = (("num_inference_steps",), ("prior_num_inference_steps", "decoder_num_inference_steps"))
# Their guidance_scale is for distilled weights only; guidance is true_cfg_scale, beside a negative prompt.
_TRUE_CFG_FAMILIES = ("QwenImage",)


def setting_arguments(
    pipeline: Pipeline, steps: int | None, guidance: float | None, size: int | None
) -> dict[str, Any]:
    """Name steps, guidance and size (pixels) as this family's call does; None leaves them to its default.

    Raises UserError where a setting is asked for that the family does not have.
    """
    family = type(pipeline).__name__
    guidance_names: Iterable[tuple[str, ...]] = _GUIDANCE
    if family.startswith(_TRUE_CFG_FAMILIES):
        guidance_names = (("true_cfg_scale",),)
    settings: dict[str, Any] = {}
    for label, value, groups in (
        ("steps", steps, _STEPS),
        ("guidance", guidance, guidance_names),
        ("size", size, (("height", "width"),)),
    ):
        if value is None:
            continue
        accepted = [
            found
            for names in groups
            if (found := accepted_arguments(pipeline, **dict.fromkeys(names, value)))
        ]
        if not accepted:
            raise UserError(f"{family} takes no {label}: leave it out (--set {label}=null)")
        settings |= accepted[0]
    if "true_cfg_scale" in settings:
        settings |= accepted_arguments(pipeline, negative_prompt=" ")
    return settings


def check_settings(pipeline: Pipeline, steps: int | None, size: int | None) -> None:
    """Raise UserError for a size or a number of steps that a pipeline refuses, before it draws.

    It is asked as its own call would ask; what a family does not check before is found when it draws.
    """
    check = getattr(pipeline, "check_inputs", None)
    known = inspect.signature(check).parameters if check is not None else {}
    if check is not None and size is not None and {"height", "width"} <= known.keys():
        given = {name: None for name, each in known.items() if each.default is each.empty}
        try:
            check(**{**given, "prompt": "a", "height": size, "width": size})
        except (TypeError, ValueError) as error:
            if "height" in str(error):
                raise UserError(f"cannot draw {size} pixels: {first_line(error)}") from None
    if steps is not None and (scheduler := getattr(pipeline, "scheduler", None)) is not None:
        try:
            copy.deepcopy(scheduler).set_timesteps(steps)
        except (TypeError, ValueError, IndexError) as error:
            if "steps" in str(error):
                raise UserError(f"cannot draw in {steps} steps: {first_line(error)}") from None


def model_hash(model: str, *, variant: str | None = None, download: bool = True) -> str:
    """Hash the names and bytes of a model's configurations and weights, without loading them."""
    source = locate_model(model, variant=variant, download=download)
    hashed: dict[str, Path] = {}
    if source.folder is not None:
        index = read_model_index(source.folder)
        used = {name for name in index if name not in UNUSED_COMPONENTS} | {"model_index.json"}
        for path in source.folder.rglob("*"):
            name = path.relative_to(source.folder)
            if path.is_file() and path.suffix in _CONTENT and name.parts[0] in used:
                hashed[name.as_posix()] = path
    if source.file is not None:
        hashed[""] = source.file
    return hash_files(hashed)


def read_scheduler(model: str, *, download: bool = True, variant: str | None = None) -> dict[str, Any] | None:
    """Return the scheduler configuration in a model's folder, None where it has none (a single file)."""
    folder = locate_model(model, variant=variant, download=download).folder
    path = folder / "scheduler" / "scheduler_config.json" if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else None


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
