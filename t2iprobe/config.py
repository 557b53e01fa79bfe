"""The settings of a study: one typed model; preset < file < what the command line says."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from t2iprobe.errors import UserError, suggest

DEFAULT_PRESET = "embedded"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_codes(value: Any) -> Any:
    return [code.strip() for code in value.split(",")] if isinstance(value, str) else value


def _join(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


TextList = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class Study(BaseModel):
    """What is drawn, by which model, and who judges it. None: the pipeline's own default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field("embedded", description="embedded, a pipeline folder, a weights file or a hub id")
    variant: str | None = Field(None, description="weight files to take, such as fp16")
    classifiers: TextList = Field(["embedded"], description="judges; the first gives the headline")
    hierarchy: Path | None = Field(
        None, description="CSV of wnids, for classifiers with other labels than ImageNet-1k"
    )
    synsets: Annotated[str, BeforeValidator(_join)] = Field(
        "nonleaf",
        description="nonleaf, leaves, all, subtree:NAME, names, wnids, lemmas or files of them, by commas",
    )
    samples: Positive = Field(4, description="pictures a synset and template")
    seed: int = Field(0, ge=0, description="of all pictures; the same seed gives the same pictures")
    templates: TextList = Field(["base"], description="published templates by name, or texts with fields")
    common_seeds: bool = Field(
        False, description="the same noise under every template, so that templates can be compared"
    )
    mean_conditioning: bool = Field(
        False, description="draw once more, from the mean of the templates' embeddings"
    )
    languages: Annotated[list[str], BeforeValidator(_as_codes)] = Field(
        [], description="languages to ask in beside English, with the same noise"
    )
    words: Positive = Field(1, description="words of a synset in each of the languages, at most")
    prompts: Path | None = Field(
        None, description="JSONL of prompts written elsewhere, in place of templates"
    )
    steps: Positive | None = Field(None, description="denoising steps")
    guidance: float | None = Field(None, ge=0, description="scale of classifier-free guidance")
    size: Positive | None = Field(None, description="pixels a side to draw")
    resize: Positive | None = Field(
        None, description="pixels a side to shrink a picture to before it is kept and judged"
    )
    scheduler: str | None = Field(
        None, description="a diffusers scheduler class, in place of the model's own"
    )
    batch_size: Positive = Field(16, description="pictures drawn at once")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the model")
    classifier_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the judges"
    )
    keep: Literal["all", "thumbnails", "none"] = Field(
        "thumbnails", description="pictures to keep in the run"
    )


def list_presets() -> dict[str, Path]:
    """Return name → file of the presets that came with the package."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")  # in a wheel; in a checkout
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def load_study(config: str | None = None, settings: Mapping[str, Any] | None = None) -> Study:
    """Build a study from the preset or YAML file `config`, then `settings`.

    A file may start from another: `preset: sd15`. Without `config` it starts from the embedded preset,
    or with another model from nothing but that pipeline's own defaults.
    Raises UserError for an unknown preset or key (with near names), an unreadable file or a bad value.
    """
    settings = dict(settings or {})
    if config is None and settings.get("model", DEFAULT_PRESET) == DEFAULT_PRESET:
        config = DEFAULT_PRESET
    values = (_read_config(config) if config else {}) | settings
    _check_keys(values, "the settings")
    try:
        return Study(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "settings"
        raise UserError(f"bad value for {key}: {first['input']!r} ({first['msg'].lower()})") from None


def _read_config(config: str) -> dict[str, Any]:
    presets = list_presets()
    path = presets.get(config, Path(config))
    if not path.is_file():
        near = suggest(config, presets) or f": the presets are {', '.join(presets)}"
        raise UserError(f"there is no preset or file {config!r}{near}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings, one `key: value` a line")
    preset = values.pop("preset", None)
    _check_keys(values, str(path))
    return values if preset is None else _read_config(str(preset)) | values


def _check_keys(keys: Iterable[Any], where: str) -> None:
    known = Study.model_fields
    for key in keys:
        if key not in known:
            near = suggest(str(key), known) or f": known are {', '.join(known)}"
            raise UserError(f"unknown key {key!r} in {where}{near}")


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs, values as in YAML. Raises UserError for a pair without a key."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set takes key=value, not {pair!r}")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key.strip()] = value
    return settings


def read_share(text: str) -> tuple[int, int]:
    """Read ``i/n`` with 0 ≤ i < n: which of n shares. Raises UserError for anything else."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard takes i/n with 0 ≤ i < n, such as 0/4, not {text!r}")
    return int(index), int(count)


def preset_values(model: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of `keys` in the first preset of a model, to draw elsewhere as a probe does."""
    for name in list_presets():
        values = _read_config(name)
        if values.get("model") == model:
            return {key: values[key] for key in keys if key in values}
    return {}


def dump_study(study: Study) -> dict[str, Any]:
    """Return a study as plain JSON values."""
    return json.loads(study.model_dump_json())
