"""The report page of one training, from its training.json and its pictures."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2iprobe import __version__
from t2iprobe.inversion.stopping import make_stopper
from t2iprobe.pages import SCALE, charts, flatten, format_seconds, render_page
from t2iprobe.pages.thumbnails import join_pictures

Training = Mapping[str, Any]  # what training.json holds (see pages/training.schema.json)

SECTIONS = (
    ("overview", "In short"),
    ("stopping", "When it stopped"),
    ("pictures", "Pictures"),
    ("evaluation", "Before and after"),
    ("use", "How to use it"),
    ("settings", "How to repeat it"),
    ("definitions", "What it means"),
)
METHODS = {
    "textual-inversion": "Textual inversion",
    "dreambooth-lora": "DreamBooth-LoRA",
    "custom-diffusion": "Custom Diffusion",
}
#: Rule → the chart of what it decides by: title, text, y axis; and the attribute that is its threshold.
STATISTICS = {
    "plateau": (
        "What could still be gained",
        "By another stretch of training, at most, as a share of what was gained so far.",
        "share",
        "share",
    ),
    "dvar": (
        "Variance of the window, by that of all",
        "The published ratio: how much the last losses vary, beside all of them.",
        "ratio",
        "eps",
    ),
    "clip": (
        "Checks without a better likeness",
        "How many checks in a row were no better than the best by a margin.",
        "checks",
        "patience",
    ),
}
LORA = "pytorch_lora_weights.safetensors"
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"
#: Pipelines that read the pooled output of a CLIP.
POOLED = ("StableDiffusionXLPipeline", "FluxPipeline")
TRAINED = {
    "textual-inversion": "{} beside its vocabulary",
    "dreambooth-lora": "{} beside its vocabulary, and adapters in its denoiser’s attention",
    "custom-diffusion": "{} beside its vocabulary, and the keys and values of its denoiser’s cross-attention",
}
BANDS = ("little noise", "middling", "much noise")
MEASURES = {
    "likeness": "Likeness to the concept’s pictures",
    "obedience": "Obedience to new prompts",
    "diversity": "Diversity",
}
MOST_GRIDS = 8
MOST_PICTURES = 12
SIDE = 192  # pixels of a picture on the page
#: The x axis ends behind the stop, for its label.
BEYOND = 1.12


def render(training: Training, folder: Path) -> str:
    """Return the report of a training in `folder` as one HTML text."""
    return render_page(
        "training_report.html",
        version=__version__,
        title=f"{training['token']}: {name_method(training['method']).lower()}",
        sections=[pair for pair in SECTIONS if pair[0] != "evaluation" or training["evaluation"]],
        training=training,
        rule=find_rule(training),
        method=name_method(training["method"]),
        model=name_model(training["model"]),
        trained=describe_trained(training),
        seconds=format_seconds(training["seconds"]),
        seconds_grids=format_seconds(training["seconds_grids"]),
        change=measure_fall(training["curve"]),
        plots=draw_plots(training),
        curve_rows=join_curves(training),
        concept=load_pictures(training["pictures"][:MOST_PICTURES], folder),
        grids=load_grids(training["grids"], folder),
        measures=[
            (label, training["evaluation"][key])
            for key, label in MEASURES.items()
            if training["evaluation"] and training["evaluation"][key]
        ],
        usage=write_usage(training),
        interfaces=list_interfaces(training),
        command=write_command(training),
        settings=flatten(training["settings"]),
        identity=[("model", training["model_hash"])],
        versions=flatten(training["versions"]),
        data={"scale": SCALE, "runs": [], "synsets": {}},
        strips=[],
    )


def name_method(method: str) -> str:
    """Return a method's name for people."""
    return METHODS.get(method, method)


def name_model(model: str) -> str:
    """Return a model's name within a sentence."""
    return "the embedded model" if model == "embedded" else model


def describe_trained(training: Training) -> str:
    """Return what a training added to its model."""
    count = training["vectors"]
    rows = "one vector" if count == 1 else f"{count} vectors"
    return TRAINED.get(training["method"], "{}").format(rows)


def measure_fall(curve: Sequence[Sequence[float]]) -> float | None:
    """Return by what share of its first value the watched loss fell, at the mean of its last tenth."""
    values = [value for _, value in curve]
    if len(values) < 2 or not values[0]:
        return None
    last = values[-max(1, len(values) // 10) :]
    return 1 - sum(last) / len(last) / values[0]


def divide_by_first(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return points whose y is divided by the first that there is."""
    first = next((y for _, y in points if y), None)
    return [(x, None if y is None or first is None else y / first) for x, y in points]


def draw_plots(training: Training) -> list[dict[str, Any]]:
    """Return the charts: {id, title, text, label, threshold, plot}, without those that have no number."""
    watched = {"watched": training["curve"]}
    rule = find_rule(training)
    if rule == "clip":
        first = ("Likeness", "Mean cosine of drawn pictures with the concept’s, at every check.", "cosine")
    else:
        text = (
            "The loss of the same inputs with the same noise, at every check. Its axis does not begin at 0."
        )
        first = ("The watched loss", text, "loss")
    bands = {
        name: divide_by_first([(row[0], row[column]) for row in training["bands"]])
        for column, name in enumerate(BANDS, start=1)
    }
    noise = "The watched loss in three thirds of the noise levels, each by its own first value."
    trained = "Running mean over the steps. Its noise hides what is learnt, so no rule looks at it."
    found = [_draw_plot(training, "curve", first, watched)]
    if rule in STATISTICS:
        texts = STATISTICS[rule][:3]
        series = {"statistic": training["statistic"]}
        found.append(_draw_plot(training, "statistic", texts, series, find_threshold(training)))
    found.append(_draw_plot(training, "bands", ("By amount of noise", noise, "loss, first = 1"), bands))
    losses = {"loss": training["train_loss"]}
    found.append(_draw_plot(training, "trained", ("The loss that is trained on", trained, "loss"), losses))
    return [chart for chart in found if any(line["path"] for line in chart["plot"]["lines"])]


def _draw_plot(
    training: Training,
    id: str,
    texts: tuple[str, str, str],
    series: Mapping[str, charts.Points],
    threshold: tuple[float, str] | None = None,
) -> dict[str, Any]:
    plot = charts.plot_lines(
        series,
        last_x=BEYOND * max(1, training["steps"]),
        include=[threshold[0]] if threshold else [],
        width=310.0 if len(series) > 1 else 370.0,
    )
    title, text, label = texts
    return {"id": id, "title": title, "text": text, "label": label, "threshold": threshold, "plot": plot}


def find_threshold(training: Training) -> tuple[float, str] | None:
    """Return at which value of its statistic the rule stops, and that as a text; None where it has none."""
    rule = find_rule(training)
    *_, name = STATISTICS[rule]
    value = getattr(make_stopper(rule, training["method"]).stopper, name)
    return value, f"stops {'above' if rule == 'clip' else 'below'} {value:g}"


def join_curves(training: Training, most: int = 40) -> list[dict[str, Any]]:
    """Return about `most` rows of the charts' numbers: {step, loss, statistic, bands}."""
    statistic = dict(training["statistic"])
    bands = {row[0]: row[1:] for row in training["bands"]}
    return [
        {"step": step, "loss": loss, "statistic": statistic.get(step), "bands": bands.get(step, [None] * 3)}
        for step, loss in charts.thin(training["curve"], most)
    ]


def load_pictures(files: Sequence[str], folder: Path) -> list[str]:
    """Return data URIs of the pictures that are there: in `folder`, or where the training found them."""
    places = ([folder / file, Path(file)] for file in files)
    paths = [next((path for path in pair if path.is_file()), None) for pair in places]
    return [join_pictures([path], SIDE).uri for path in paths if path is not None]


def choose_evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def load_grids(grids: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return {step, prompts, pictures} of the grids at chosen steps whose pictures are there."""
    loaded = [
        {"step": grid["step"], "prompts": grid["prompts"], "pictures": load_pictures(grid["files"], folder)}
        for grid in choose_evenly(grids, MOST_GRIDS)
    ]
    return [grid for grid in loaded if grid["pictures"] and len(grid["pictures"]) == len(grid["prompts"])]


def find_rule(training: Training) -> str:
    """Return the rule that watched a training, whether it or the cap of steps stopped it."""
    rule = training["stop"]["rule"]
    return training["settings"]["stop"] if rule == "cap" else rule


def write_usage(training: Training) -> str:
    """Return the lines of Python that load what was trained into diffusers and draw with it."""
    token, files = json.dumps(training["token"]), training["files"]
    model = json.dumps(training["model"])
    if training["model"] == "embedded":
        lines = ["from t2iprobe.pipelines import load_pipeline", "", f"pipe = load_pipeline({model})"]
    else:
        lines = ["from diffusers import AutoPipelineForText2Image", ""]
        lines += [f"pipe = AutoPipelineForText2Image.from_pretrained({model})"]
    if LORA in files:
        lines.append(f'pipe.load_lora_weights("OUT", weight_name="{LORA}")')
    if CUSTOM_DIFFUSION in files:
        # Without the pipeline diffusers 0.42 reads the file and changes nothing.
        lines.append(f'pipe.unet.load_attn_procs("OUT", weight_name="{CUSTOM_DIFFUSION}", _pipeline=pipe)')
    if find_interface_file(training) is None:  # LDM: diffusers has no loader for it
        lines.insert(0, "from t2iprobe.inversion.formats import load_into, read_embedding")
        lines.append('load_into(pipe, read_embedding("OUT/learned_embeds.safetensors")[0])')
    else:
        rows = [name for name in files if name.startswith("learned_embeds")]
        ends = ["", *(f"_{number}" for number in range(2, len(rows) + 1))]
        for name, end in zip(rows, ends, strict=True):
            where = (
                f", tokenizer=pipe.tokenizer{end}, text_encoder=pipe.text_encoder{end}" if rows[1:] else ""
            )
            lines.append(f'pipe.load_textual_inversion("OUT/{name}", token={token}{where})')
    lines += write_pooling(training)
    prompt = json.dumps(f"a photo of a {training['token']}")
    if training.get("pipeline") == "FluxPipeline":  # whose T5 has no row for the token
        from t2iprobe.inversion.embeddings import spell_tokens

        prompt += f", prompt_2={spell_tokens(prompt)}"
    return "\n".join([*lines, f'pipe({prompt}).images[0].save("picture.png")'])


def write_pooling(training: Training) -> list[str]:
    """Return the lines that let CLIP pool at the end of a prompt, as it did in training (`pool_at_end`)."""
    if training.get("pipeline") not in POOLED:
        return []
    return [
        "for module in (*pipe.text_encoder.modules(), *pipe.text_encoder_2.modules()):",
        '    if getattr(module, "eos_token_id", None) == 2:  # else CLIP pools at the word, not at the end',
        "        module.eos_token_id = pipe.tokenizer.eos_token_id",
    ]


def find_interface_file(training: Training) -> str | None:
    """Return the file of rows that user interfaces load, named as the token; None where none can."""
    others = (name for name in training["files"] if not name.startswith(("learned_embeds", "pytorch_")))
    return next(others, None)


def list_interfaces(training: Training) -> list[dict[str, str]]:
    """Return for each user interface {where, commands, prompt}: how it gets what was trained."""
    file = find_interface_file(training)
    flux = training.get("pipeline") == "FluxPipeline"  # kohya joins what diffusers trains apart there
    if file is None or CUSTOM_DIFFUSION in training["files"] or (flux and LORA in training["files"]):
        return []
    name = Path(file).stem
    rows = (
        ("A1111, Forge", "embeddings", name, "models/Lora", f" <lora:{name}-lora:1>"),
        ("ComfyUI", "models/embeddings", f"embedding:{name}", "models/loras", ", with a LoRA loader"),
    )
    found = []
    for where, embeddings, word, loras, more in rows:
        entry = {"where": where, "commands": f"cp OUT/{file} {embeddings}/", "prompt": f"a photo of a {word}"}
        if LORA in training["files"]:
            converted = f"{loras}/{name}-lora.safetensors"
            entry["commands"] += f"\nt2iprobe inversion convert OUT/{LORA} {converted} --to kohya"
            entry["prompt"] += more
        found.append(entry)
    return found


def write_command(training: Training) -> str:
    """Return the command that repeats the training: what differs from the default settings of its model."""
    settings = dict(training["settings"])
    folder = str(Path(training["pictures"][0]).parent) if training["pictures"] else "DIR"
    parts = ["t2iprobe", "inversion", "train", folder, "--token", training["token"]]
    for key in ("model", "method", "stop", "max_steps", "seed"):
        if settings.get(key) is not None:
            parts += [f"--{key.replace('_', '-')}", str(settings.pop(key))]
    return shlex.join([*parts, *list_changes(settings, training["model"]), "--out", "OUT"])


def list_changes(settings: Mapping[str, Any], model: str) -> list[str]:
    """Return ``--set key=value`` for each of the settings that is not a model's default."""
    from t2iprobe.inversion.commands import load_training

    defaults = load_training({"model": model}).model_dump()
    changed = {key: value for key, value in settings.items() if value != defaults.get(key)}
    return [
        part
        for key, value in changed.items()
        for part in ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")
    ]
