"""Embeddings and adapters in and out: diffusers, A1111, ComfyUI and kohya.

| form       | file                                                      | trigger word          |
|------------|-----------------------------------------------------------|-----------------------|
| diffusers  | {token: [n, d]}; a second encoder in a second file, `_2`  | the token             |
| a1111      | {emb_params: [n, d]}; with several encoders as sdxl       | the file's name       |
| a1111-pt   | {string_to_param: {"*": [n, d]}, name, …}, a pickle       | the file's name       |
| sdxl       | {clip_l: [n, 768], clip_g: [n, 1280]}, for Flux t5xxl     | the file's name       |
| kohya      | as a1111, with ModelSpec metadata                         | the file's name       |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2iprobe.errors import UserError, suggest
from t2iprobe.inversion.adapters import (
    describe_custom_diffusion,
    describe_lora,
    load_custom_diffusion,
    read_custom_diffusion,
    write_custom_diffusion,
    write_kohya_lora,
)
from t2iprobe.inversion.embeddings import check_token, pool_at_end
from t2iprobe.inversion.weight_files import (
    KINDS,
    WeightFile,
    list_dtypes,
    pickle_tensors,
    read_weights,
    write_safetensors,
)
from t2iprobe.pipelines import Pipeline
from t2iprobe.storage import write_output

__all__ = [
    "BASE_MODELS",
    "FORMS",
    "Embedding",
    "as_token",
    "convert",
    "find_base_models",
    "fit_vectors",
    "inspect",
    "load_custom_diffusion",
    "load_into",
    "match_encoders",
    "read_custom_diffusion",
    "read_embedding",
    "text_encoders",
    "write_custom_diffusion",
    "write_embedding",
]

FORMS = ("diffusers", "a1111", "a1111-pt", "sdxl", "kohya")
# What the encoders are called in files, and by whom else.
_ENCODERS = {
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5xxl": "t5xxl",
    "text_encoders_0": "clip_l",  # pivotal tuning of SDXL
    "text_encoders_1": "clip_g",
}
_ENCODER_OF_WIDTH = {768: "clip_l", 1280: "clip_g", 4096: "t5xxl"}
# The width of the rows that a base model's text encoders take.
BASE_MODELS = {
    "Stable Diffusion 1": {"clip_l": 768},
    "Stable Diffusion 2": {"clip_l": 1024},
    "SDXL": {"clip_l": 768, "clip_g": 1280},
    "Stable Diffusion 3": {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096},
    "FLUX.1": {"clip_l": 768, "t5xxl": 4096},
    "LDM text-to-image": {"bert": 1280},
    "embedded": {"clip_l": 192},
}
_ARCHITECTURES = {  # kohya's names of them
    "Stable Diffusion 1": "stable-diffusion-v1",
    "Stable Diffusion 2": "stable-diffusion-v2-512",
    "SDXL": "stable-diffusion-xl-v1-base",
    "Stable Diffusion 3": "stable-diffusion-3",
    "FLUX.1": "flux-1",
}


@dataclass(frozen=True)
class Embedding:
    """The rows of a token: encoder (clip_l, clip_g, t5xxl; "" for the only one) → float32 [n, d]."""

    token: str
    vectors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """An embedding as a file stores it: not checked, not cast, perhaps without a name."""

    form: str
    name: str | None
    rows: dict[str, Any]


def read_embedding(path: str | Path, token: str | None = None) -> list[Embedding]:
    """Read the tokens of an embedding file in any form, or of a folder's ``learned_embeds``.

    `token` renames the only token of a file, or chooses one of several. A file that names none (a bare
    tensor, A1111, SDXL) is called after what we noted in its metadata, or else after the file.
    Raises UserError where the file is missing, damaged, not an embedding, or holds code.
    """
    file = read_weights(path)
    if file.kind != "embedding":
        raise UserError(f"{file.path} holds {KINDS[file.kind]}, no embedding")
    found = _embeddings(file, _parse(file))
    if token is None:
        return found
    if len(found) == 1:
        return [replace(found[0], token=token)]
    chosen = [embedding for embedding in found if embedding.token == token]
    if not chosen:
        names = [embedding.token for embedding in found]
        raise UserError(
            f"{file.path} has no token {token!r}: it has {', '.join(names)}{suggest(token, names)}"
        )
    return chosen


def _parse(file: WeightFile) -> list[_Stored]:
    content, kohya = file.content, "modelspec.sai_model_spec" in file.metadata
    encoder = file.metadata.get("encoder", "")
    if isinstance(content, Tensor):
        return [_Stored("tensor", None, {"": content})]
    if "string_to_param" in content:
        rows = content["string_to_param"]
        values = list(rows.values()) if hasattr(rows, "values") else []
        if len(values) != 1:
            raise UserError(f"{file.path} holds {len(values)} embeddings under string_to_param, not one")
        name = content.get("name")
        return [_Stored("a1111-pt", name if isinstance(name, str) else None, {encoder: values[0]})]
    if set(content) <= set(_ENCODERS):
        form = "kohya" if kohya else "sdxl"
        return [_Stored(form, None, {_ENCODERS[name]: rows for name, rows in content.items()})]
    if set(content) == {"emb_params"}:
        return [_Stored("kohya" if kohya else "a1111", None, {encoder: content["emb_params"]})]
    return [_Stored("diffusers", str(name), {encoder: rows}) for name, rows in content.items()]


def _embeddings(file: WeightFile, stored: list[_Stored]) -> list[Embedding]:
    metadata = _without_notes(file.metadata)
    found = [
        Embedding(
            item.name or file.metadata.get("token") or file.path.stem,
            {encoder: _as_rows(rows, file.path) for encoder, rows in item.rows.items()},
            metadata,
        )
        for item in stored
    ]
    if len(found) == 1 and stored[0].form == "diffusers":
        return [_join_others(file.path, found[0])]
    return found


def _without_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Leave out of a file's metadata what describes the file: an embedding has it of its own."""
    return {name: value for name, value in metadata.items() if name not in ("format", "token", "encoder")}


def _as_rows(rows: Any, path: Path) -> Tensor:
    if (
        not isinstance(rows, Tensor)
        or not rows.is_floating_point()
        or rows.ndim not in (1, 2)
        or not rows.numel()
    ):
        raise UserError(
            f"{path} is not an embedding: its rows are no matrix [vectors, width] of real numbers"
        )
    if not rows.isfinite().all():
        raise UserError(f"{path} is not a usable embedding: its rows hold NaN or infinity")
    return rows.detach().float().reshape(-1, rows.shape[-1]).contiguous()


def _beside(path: Path, number: int) -> Path:
    """Return the file of a further encoder, where diffusers' scripts for SDXL write it."""
    return path.with_name(f"{path.stem}_{number}{path.suffix}")


def _join_others(path: Path, first: Embedding) -> Embedding:
    """Add the rows of the further encoders, where all say which they are, or their widths do."""
    embeddings = [first]
    for number in (2, 3):
        if not _beside(path, number).exists():
            break
        file = read_weights(_beside(path, number))
        items = _parse(file) if file.kind == "embedding" else []
        if [item.name for item in items] != [first.token]:
            break
        rows = {encoder: _as_rows(rows, file.path) for encoder, rows in items[0].rows.items()}
        embeddings.append(Embedding(first.token, rows))
    parts = [part for embedding in embeddings for part in embedding.vectors.items()]
    named = {encoder or _ENCODER_OF_WIDTH.get(rows.shape[1], ""): rows for encoder, rows in parts}
    return replace(first, vectors=named) if len(named) == len(parts) > 1 and "" not in named else first


# -- writing -----------------------------------------------------------------------------------------------


def write_embedding(path: str | Path, embedding: Embedding, form: str) -> list[Path]:
    """Write an embedding in one of FORMS, float32. Returns the files: diffusers needs one for each encoder.

    The token, the encoder and the embedding's metadata are noted in the file.
    Raises UserError for an unknown form, a name with another suffix than the form's, a token that prompts
    could not hold (see `check_token`), and where the file cannot be written.
    """
    path = Path(path)
    if form not in FORMS:
        raise UserError(f"there is no form {form!r}{suggest(form, FORMS) or ': use ' + ', '.join(FORMS)}")
    suffix = ".pt" if form == "a1111-pt" else ".safetensors"
    if path.suffix != suffix:
        raise UserError(f"the form {form} is a {suffix} file: call it {path.with_suffix(suffix)}")
    check_token(embedding.token, ())
    vectors = {name: rows.detach().float().cpu().contiguous() for name, rows in embedding.vectors.items()}
    metadata = {**_without_notes(embedding.metadata), "token": embedding.token}
    if form == "diffusers":
        written = [path, *(_beside(path, number) for number in range(2, len(vectors) + 1))]
        for target, (encoder, rows) in zip(written, vectors.items(), strict=True):
            write_safetensors(target, {embedding.token: rows}, {**metadata, **_note(encoder)})
        return written
    if form == "kohya":
        metadata |= _model_spec(embedding)
    if len(vectors) > 1 or form == "sdxl":
        named = {
            name or _ENCODER_OF_WIDTH.get(rows.shape[1], "clip_l"): rows for name, rows in vectors.items()
        }
        if form == "a1111-pt":  # A1111 takes every entry beside these for another encoder's rows
            write_output(path, pickle_tensors(named))
        else:
            write_safetensors(path, named, metadata)
        return [path]
    ((encoder, rows),) = vectors.items()
    metadata |= _note(encoder)
    if form == "a1111-pt":
        write_output(path, pickle_tensors(_automatic1111(embedding.token, rows, metadata)))
    else:
        write_safetensors(path, {"emb_params": rows}, metadata)
    return [path]


def _note(encoder: str) -> dict[str, str]:
    return {"encoder": encoder} if encoder else {}


def _automatic1111(token: str, rows: Tensor, metadata: Mapping[str, str]) -> dict[str, Any]:
    steps = metadata.get("steps", "")
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": token,
        "step": int(steps) if steps.isdecimal() else None,
        "sd_checkpoint": metadata.get("base_model_hash"),
        "sd_checkpoint_name": metadata.get("base_model"),
        "metadata": dict(metadata),
    }


def _model_spec(embedding: Embedding) -> dict[str, str]:
    """Return the metadata that kohya's trainers write: Stability's ModelSpec, as far as it is known."""
    fitting = [_ARCHITECTURES[name] for name in find_base_models(embedding) if name in _ARCHITECTURES]
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{fitting[0] if fitting else 'unknown'}/textual-inversion",
        "modelspec.implementation": "diffusers",
        "modelspec.title": embedding.token.strip("<>"),
        "modelspec.trigger_phrase": embedding.token,
    }


def as_token(name: str) -> str:
    """Return ``<name>`` in lower case for a token or file name: ``My Cat`` becomes ``<my-cat>``.

    Raises UserError where nothing is left of it.
    """
    cleaned = re.sub(r"[^a-z0-9_.+-]+", "-", name.lower()).strip("-_.+")
    if not cleaned:
        raise UserError(f"no token can be made of the name {name!r}: give --token '<name>'")
    return f"<{cleaned}>"


def convert(source: str | Path, target: str | Path, form: str, token: str | None = None) -> list[Path]:
    """Write an embedding file in another form, or diffusers' LoRA weights in kohya's. Returns the files.

    Tokens become ``<lower-case>`` unless `token` says otherwise.
    Raises UserError as `read_embedding` and `write_embedding` do, and where a file of several tokens needs
    `token` to choose.
    """
    file = read_weights(source)
    if file.kind != "embedding":
        if file.kind == "lora" and form == "kohya":
            return [write_kohya_lora(file, Path(target))]
        raise UserError(
            f"{file.path} holds {KINDS[file.kind]}, which cannot be written as {form}"
            + (": use kohya" if file.kind == "lora" else "")
        )
    found = read_embedding(source, token)
    if len(found) > 1:
        names = ", ".join(embedding.token for embedding in found)
        raise UserError(f"{file.path} holds several tokens ({names}): choose one with --token")
    return write_embedding(target, replace(found[0], token=token or as_token(found[0].token)), form)


# -- pipelines ---------------------------------------------------------------------------------------------


def text_encoders(pipeline: Pipeline) -> dict[str, tuple[Any, Any]]:
    """Return a pipeline's (tokenizer, text encoder) by the names that files give the encoders, or bert."""
    found: dict[str, tuple[Any, Any]] = {}
    for number in ("", "_2", "_3"):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        name = "t5xxl" if "T5" in type(encoder).__name__ else "clip_g" if number == "_2" else "clip_l"
        if tokenizer is not None and encoder is not None:
            found[name] = (tokenizer, encoder)
    if getattr(pipeline, "bert", None) is not None:
        found["bert"] = (pipeline.tokenizer, pipeline.bert)
    return found


def match_encoders(given: Mapping[str, int], taken: Mapping[str, int]) -> dict[str, str]:
    """Return encoder of a model → encoder of a file, from both sides' names and widths of rows.

    A file that names no encoder goes to the one of its width. Rows for T5 may be missing, others may not.
    Raises UserError, with both widths, where they do not fit.
    """
    told = " and ".join(f"{width} ({name})" if name else f"{width}" for name, width in given.items())
    wanted = " and ".join(f"{width} ({name})" for name, width in taken.items())
    if len(given) == len(taken) == 1:
        ((key, _),), ((name, _),) = given.items(), taken.items()
        pairs = {name: key} if key in ("", "clip_l", name) else {}
    elif set(given) == {""}:
        pairs = {name: "" for name, width in taken.items() if width == given[""]}
    else:
        pairs = {name: name for name in given if name in taken}
    missing = [name for name in taken if name not in pairs and name != "t5xxl"]
    fits = all(given[key] == taken[name] for name, key in pairs.items())
    if len(pairs) != len(given) or missing or not fits:
        raise UserError(
            f"the embedding has rows of width {told}, but the model takes {wanted}: it is for another"
        )
    return pairs


def fit_vectors(embedding: Embedding, encoders: Mapping[str, tuple[Any, Any]]) -> dict[str, Tensor]:
    """Return encoder of `encoders` (name → tokenizer, text encoder) → the embedding's rows [n, d] for it.

    Raises UserError, with both widths, where the embedding is not for these encoders.
    """
    taken = {name: encoder.get_input_embeddings().weight.shape[1] for name, (_, encoder) in encoders.items()}
    given = {name: rows.shape[1] for name, rows in embedding.vectors.items()}
    try:
        pairs = match_encoders(given, taken)
    except UserError as error:
        raise UserError(f"cannot load {embedding.token}: {error}") from None
    return {name: embedding.vectors[key] for name, key in pairs.items()}


@torch.no_grad()
def load_into(pipeline: Pipeline, embedding: Embedding) -> str:
    """Add an embedding's token to a pipeline. Returns what a prompt must say for it.

    Unlike diffusers' loader this loads files of two encoders, never leaves a vector unused, and takes
    families whose pipelines have no such loader. The token becomes ``<lower-case>``, and its further vectors
    ``<token>_1``…, which a pipeline with a loader writes into the prompt itself; for the others they are in
    what is returned.
    Raises UserError where the token cannot be taken, or the embedding is not for this model.
    """
    encoders = text_encoders(pipeline)
    token = as_token(embedding.token)
    vectors = fit_vectors(embedding, encoders)
    for name in vectors:
        tokenizer, encoder = encoders[name]
        check_token(token, tokenizer.get_vocab())
        if encoder.get_input_embeddings().weight.is_meta:
            raise UserError("load embeddings before the pipeline's sequential offloading is enabled")
    parts = [token]
    for name, rows in vectors.items():
        tokenizer, encoder = encoders[name]
        parts = [token, *(f"{token}_{number}" for number in range(1, len(rows)))]
        tokenizer.add_tokens(parts)
        pool_at_end(tokenizer, encoder)
        if len(tokenizer) > encoder.get_input_embeddings().weight.shape[0]:  # T5 has more rows than tokens
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        matrix = encoder.get_input_embeddings().weight
        matrix[tokenizer.convert_tokens_to_ids(parts)] = rows.to(matrix)
    return token if hasattr(pipeline, "maybe_convert_prompt") else " ".join(parts)


# -- inspecting --------------------------------------------------------------------------------------------


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a file, ready for JSON: `kind` embedding, lora or custom-diffusion, and what is in it.

    embedding: form, token, vectors (how many), width, dtype and norms by encoder, `fits` (base models, by
    width), `notes` (what other loaders get wrong with it); `others` of a file with several tokens.
    lora: form, rank, ranks, alpha, modules (how many) and components (how many modules in each).
    custom-diffusion: modules, width. Each: metadata, fits, dtype.
    Raises UserError where the file cannot be read or is of no such kind.
    """
    file = read_weights(path)
    describe = {
        "embedding": _describe_embedding,
        "lora": describe_lora,
        "custom-diffusion": describe_custom_diffusion,
    }
    described = {"file": str(file.path), "kind": file.kind, **describe[file.kind](file)}
    return {**described, "metadata": file.metadata}


def find_base_models(embedding: Embedding) -> list[str]:
    """Return the base models whose text encoders take rows of the embedding's widths."""
    given = {name: rows.shape[1] for name, rows in embedding.vectors.items()}
    return [name for name, taken in BASE_MODELS.items() if _fits(given, taken)]


def _fits(given: Mapping[str, int], taken: Mapping[str, int]) -> bool:
    try:
        match_encoders(given, taken)
    except UserError:
        return False
    return True


def _describe_embedding(file: WeightFile) -> dict[str, Any]:
    stored = _parse(file)
    described = []
    for embedding, item in zip(_embeddings(file, stored), stored, strict=True):
        described.append(
            {
                "form": item.form,
                "token": embedding.token,
                "vectors": max(len(rows) for rows in embedding.vectors.values()),
                "width": {name: rows.shape[1] for name, rows in embedding.vectors.items()},
                "dtype": list_dtypes(item.rows.values()),
                "norms": {
                    name: [round(norm, 6) for norm in rows.norm(dim=1).tolist()]
                    for name, rows in embedding.vectors.items()
                },
                "fits": find_base_models(embedding),
                "notes": _note_traps(item.form, embedding, len(stored)),
            }
        )
    first, *others = described
    return {**first, "others": others}


def _note_traps(form: str, embedding: Embedding, tokens: int) -> list[str]:
    notes = []
    token, several = embedding.token, any(len(rows) > 1 for rows in embedding.vectors.values())
    if form == "diffusers" and token != token.lower() and several:
        notes.append(f"diffusers lower-cases prompts: of {token} it would use the first vector alone")
    if form == "diffusers" and not (token.startswith("<") and token.endswith(">")):
        notes.append(f"diffusers also finds {token} inside longer words")
    if form == "diffusers" and tokens > 1:
        notes.append("diffusers loads no file of several tokens: convert each with --token")
    if form in ("a1111", "kohya") and len(embedding.vectors) == 1:
        notes.append(f"diffusers calls it emb_params unless it is told token={token!r}")
    if len(embedding.vectors) > 1 and form != "diffusers":
        notes.append("diffusers loads each encoder's rows by themselves: token=, text_encoder=, tokenizer=")
    return notes
