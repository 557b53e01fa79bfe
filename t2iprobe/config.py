"""The settings of a study: one typed model; preset < file < what the command line says."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from t2iprobe.errors import UserError, suggest

DEFAULT_PRESET = "embedded"
DEFAULT_BATCH = 16  # pictures


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
    until: str | None = Field(
        None, description='draw until this is known: "isp ± 0.005", "isp - RUN ± 0.005" or "unknown"'
    )
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
    batch_size: Positive | Literal["auto"] = Field(
        "auto", description="pictures drawn at once; auto: as many as pay and fit the memory"
    )
    compile: bool = Field(False, description="torch.compile of the denoiser; on a GPU of the decoder, too")
    attention: str | None = Field(
        None, description="diffusers' attention back end, such as sage or _native_cudnn"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the model")
    classifier_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the judges"
    )
    keep: Literal["all", "thumbnails", "none"] = Field(
        "thumbnails", description="pictures to keep in the run"
    )

    @property
    def fixed_batch_size(self) -> int | None:
        """How many pictures are drawn at once; None where it is to be found."""
        return None if self.batch_size == "auto" else self.batch_size

    @property
    def pictures_at_once(self) -> int:
        """How many pictures to handle together where nothing is measured."""
        return self.fixed_batch_size or DEFAULT_BATCH


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
    return make_study(_read_values(config, settings))


def _read_values(
    config: str | None, settings: Mapping[str, Any] | None, also: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings of a preset or file, then `settings`; a file may hold the keys `also`, too."""
    settings = dict(settings or {})
    if config is None and settings.get("model", DEFAULT_PRESET) == DEFAULT_PRESET:
        config = DEFAULT_PRESET
    _check_keys(settings, "the settings")
    return (_read_config(config, also) if config else {}) | settings


def make_study(values: Mapping[str, Any]) -> Study:
    """Return the study of these settings. Raises UserError naming the first bad value."""
    try:
        return Study(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "settings"
        raise UserError(f"bad value for {key}: {first['input']!r} ({first['msg'].lower()})") from None


#: What a sweep varies → the setting of a study.
SWEPT = {
    "guidance": "guidance",
    "steps": "steps",
    "size": "size",
    "scheduler": "scheduler",
    "template": "templates",
    "seed": "seed",
}


def load_sweep(
    config: str | None = None, settings: Mapping[str, Any] | None = None, over: Iterable[str] = ()
) -> tuple[Study, dict[str, list[Any]]]:
    """Return a study and what a sweep varies of it: axis → values, from the file's `sweep:` and `over`.

    `over` are ``axis=value,value``; a text that holds commas stands in a YAML list. An axis named in `over`
    replaces that of the file. Raises UserError as `load_study` does, and where nothing or an unknown key is
    varied.
    """
    values = _read_values(config, settings, ("sweep",))
    written = values.pop("sweep", None) or {}
    if not isinstance(written, dict):
        raise UserError(f"sweep must map settings to lists of values, not {written!r}")
    given: dict[str, list[Any]] = {}
    for pair in over:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--over takes key=value,value, not {pair!r}")
        given.setdefault(_name_axis(key.strip()), []).extend(_read_list(text))
    axes = {_name_axis(key): value if isinstance(value, list) else [value] for key, value in written.items()}
    axes |= given
    if empty := next((key for key, found in axes.items() if not found), None):
        raise UserError(f"the sweep gives no value for {empty}")
    if not axes:
        raise UserError(
            "nothing varies: give --over guidance=1,2.5,5 or `sweep:` in a file, with any of "
            f"{', '.join(SWEPT)}"
        )
    return make_study(values), axes


def _name_axis(key: Any) -> str:
    found = next((name for name, setting in SWEPT.items() if key in (name, f"{name}s", setting)), None)
    if found is None:
        near = suggest(str(key), SWEPT) or f": it varies {', '.join(SWEPT)}"
        raise UserError(f"a sweep does not vary {key!r}{near}")
    return found


def _read_list(text: str) -> list[Any]:
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str):
            value = [yaml.safe_load(part) for part in text.split(",")]
    except yaml.YAMLError:
        value = text
    return value if isinstance(value, list) else [value]


def _read_config(config: str, also: Sequence[str] = ()) -> dict[str, Any]:
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
    _check_keys(values, str(path), also)
    return values if preset is None else _read_config(str(preset), also) | values


def _check_keys(keys: Iterable[Any], where: str, also: Sequence[str] = ()) -> None:
    known = Study.model_fields
    for key in keys:
        if key == "sweep" and key not in also:
            raise UserError(f"{where} describes a sweep: t2iprobe hypernymy sweep {where} --out DIR")
        if key not in known and key not in also:
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
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
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
