import itertools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from t2iprobe.errors import UserError
from t2iprobe.inversion.formats import (
    BASE_MODELS,
    FORMS,
    Embedding,
    as_token,
    convert,
    find_base_models,
    inspect,
    load_custom_diffusion,
    load_into,
    match_encoders,
    read_custom_diffusion,
    read_embedding,
    text_encoders,
    write_custom_diffusion,
    write_embedding,
)
from t2iprobe.testing import tiny_pipeline

METADATA = {"base_model": "tiny", "base_model_hash": "sha256:0", "steps": "120", "stop_reason": "flat — é"}


def make_rows(vectors: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))


def make_one(vectors: int = 3) -> Embedding:
    return Embedding("<cat>", {"": make_rows(vectors)}, METADATA)


def make_two(vectors: int = 2) -> Embedding:
    return Embedding("<cat>", {"clip_l": make_rows(vectors), "clip_g": make_rows(vectors, seed=1)}, METADATA)


def name_file(form: str, name: str = "cat") -> str:
    return f"{name}.pt" if form == "a1111-pt" else f"{name}.safetensors"


def look_up(tokenizer: Any, encoder: Any, token: str, vectors: int) -> torch.Tensor:
    """The rows that a pipeline would use for a token that diffusers' loader was given."""
    parts = [token, *(f"{token}_{number}" for number in range(1, vectors))]
    ids = tokenizer.convert_tokens_to_ids(parts)
    assert tokenizer.unk_token_id not in ids
    return encoder.get_input_embeddings().weight[ids].detach()


def assert_same(found: Embedding, expected: Embedding) -> None:
    assert found.token == expected.token
    assert set(found.vectors) == set(expected.vectors)
    for name, rows in expected.vectors.items():
        assert found.vectors[name].dtype == torch.float32
        assert torch.equal(found.vectors[name], rows)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_diffusers_own_loader_finds_the_same_rows(tmp_path: Path, form: str, vectors: int) -> None:
    embedding = make_one(vectors)
    (path,) = write_embedding(tmp_path / name_file(form), embedding, form)
    pipeline = tiny_pipeline("sd")

    named = form in ("diffusers", "a1111-pt")  # of the other forms the file's name is the token
    pipeline.load_textual_inversion(str(path), **({} if named else {"token": "<cat>"}))

    found = look_up(pipeline.tokenizer, pipeline.text_encoder, "<cat>", vectors)
    assert torch.equal(found, embedding.vectors[""])
    expanded = " ".join(["<cat>", *(f"<cat>_{number}" for number in range(1, vectors))])
    assert pipeline.maybe_convert_prompt("a <cat> here", pipeline.tokenizer) == f"a {expanded} here"


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_own_loader_finds_the_rows_of_each_encoder(tmp_path: Path, form: str) -> None:
    embedding = make_two()
    written = write_embedding(tmp_path / name_file(form), embedding, form)
    pipeline = tiny_pipeline("sdxl")
    encoders = {
        "clip_l": (pipeline.tokenizer, pipeline.text_encoder),
        "clip_g": (pipeline.tokenizer_2, pipeline.text_encoder_2),
    }

    if form == "diffusers":
        assert [path.name for path in written] == ["cat.safetensors", "cat_2.safetensors"]
        sources: dict[str, Any] = dict(zip(encoders, map(str, written), strict=True))
    else:
        with pytest.raises(ValueError, match="single key"):
            pipeline.load_textual_inversion(str(written[0]), token="<cat>")
        sources = torch.load(written[0]) if form == "a1111-pt" else load_file(written[0])
    for name, (tokenizer, encoder) in encoders.items():
        pipeline.load_textual_inversion(
            sources[name], token="<cat>", tokenizer=tokenizer, text_encoder=encoder
        )
        assert torch.equal(look_up(tokenizer, encoder, "<cat>", 2), embedding.vectors[name])


@pytest.mark.parametrize(("first", "second"), itertools.product(FORMS, FORMS))
def test_any_form_becomes_any_other_and_comes_back(tmp_path: Path, first: str, second: str) -> None:
    for embedding, name in ((make_one(), "one"), (make_two(), "cat")):
        (tmp_path / name).mkdir()
        source, *_ = write_embedding(tmp_path / name / name_file(first), embedding, first)
        middle, *_ = convert(source, tmp_path / name / name_file(second, "cat-middle"), second)
        back, *_ = convert(middle, tmp_path / name / name_file(first, "back"), first, token="<cat>")
        (found,) = read_embedding(back, token="<cat>")

        if len(embedding.vectors) > 1:
            assert_same(found, embedding)
        else:
            assert torch.equal(*(next(iter(item.vectors.values())) for item in (found, embedding)))
        if not (len(embedding.vectors) > 1 and "a1111-pt" in (first, second)):  # it has no place for them
            assert METADATA.items() <= found.metadata.items()
            assert read_embedding(middle)[0].token == "<cat>"


def test_an_embedding_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for form in set(FORMS) - {"sdxl", "kohya"}:
        path, *_ = write_embedding(tmp_path / name_file(form, form), make_one(), form)
        (found,) = read_embedding(path)
        assert_same(found, make_one())
        assert found.metadata == METADATA


def test_the_same_embedding_gives_the_same_bytes(tmp_path: Path) -> None:
    for form in FORMS:
        files = [
            write_embedding(tmp_path / name_file(form, f"{form}{number}"), make_one(), form)[0]
            for number in range(3)
        ]
        assert len({path.read_bytes() for path in files}) == 1, form


def test_kohya_and_a1111_find_the_fields_that_they_read(tmp_path: Path) -> None:
    (path,) = write_embedding(tmp_path / "cat.pt", make_one(), "a1111-pt")
    stored = torch.load(path, weights_only=True)
    assert list(stored["string_to_token"]) == list(stored["string_to_param"]) == ["*"]
    assert stored["name"] == "<cat>"
    assert (stored["step"], stored["sd_checkpoint_name"]) == (120, "tiny")

    wide = Embedding("<cat>", {"clip_l": make_rows(2, 768), "clip_g": make_rows(2, 1280)}, METADATA)
    (path,) = write_embedding(tmp_path / "cat.safetensors", wide, "kohya")
    metadata = inspect(path)["metadata"]
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert set(load_file(path)) == {"clip_l", "clip_g"}


def test_files_of_others_are_read(tmp_path: Path) -> None:
    rows = make_rows(2)
    original = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": rows}}
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})
    pickles = {
        "bare.pt": rows,
        "old.pt": {**original, "string_to_param": parameters},
        "webui.pt": {**original, "name": "My Cat", "step": 99, "sd_checkpoint": None},
        "flat.bin": {"<cat>": rows[0]},
        "half.bin": {"<cat>": rows.half()},
    }
    for name, content in pickles.items():
        torch.save(content, tmp_path / name)
    save_file({"emb_params": rows}, tmp_path / "photo-cat.safetensors")
    save_file({"text_encoders_0": rows, "text_encoders_1": rows.clone()}, tmp_path / "pivotal.safetensors")
    torch.save({"emb_params": rows}, tmp_path / "misnamed.safetensors")

    found = {path.name: read_embedding(path) for path in tmp_path.iterdir()}

    assert {name: [embedding.token for embedding in item] for name, item in found.items()} == {
        "bare.pt": ["bare"],
        "old.pt": ["old"],
        "webui.pt": ["My Cat"],
        "flat.bin": ["<cat>"],
        "half.bin": ["<cat>"],
        "photo-cat.safetensors": ["photo-cat"],
        "pivotal.safetensors": ["pivotal"],
        "misnamed.safetensors": ["misnamed"],
    }
    assert found["webui.pt"][0].metadata == {"step": "99"}
    assert set(found["pivotal.safetensors"][0].vectors) == {"clip_l", "clip_g"}
    assert torch.equal(found["flat.bin"][0].vectors[""], rows[:1])
    assert torch.equal(found["half.bin"][0].vectors[""], rows.half().float())
    for name in ("bare.pt", "old.pt", "webui.pt", "photo-cat.safetensors", "misnamed.safetensors"):
        assert torch.equal(found[name][0].vectors[""], rows), name


def test_a_file_of_several_tokens_is_read_and_one_of_them_converted(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file({"<cat>": make_rows(1), "<Dog>": make_rows(2, seed=1)}, path)

    assert [embedding.token for embedding in read_embedding(path)] == ["<Dog>", "<cat>"]
    assert inspect(path)["others"][0]["token"] == "<cat>"
    with pytest.raises(UserError, match=r"several tokens \(<Dog>, <cat>\): choose one with --token"):
        convert(path, tmp_path / "one.safetensors", "diffusers")
    with pytest.raises(UserError, match="did you mean <cat>"):
        convert(path, tmp_path / "one.safetensors", "diffusers", token="<cad>")
    convert(path, tmp_path / "one.safetensors", "diffusers", token="<cat>")
    assert_same(read_embedding(tmp_path / "one.safetensors")[0], Embedding("<cat>", {"": make_rows(1)}))


def test_pairs_of_files_of_diffusers_scripts_are_read_as_one(tmp_path: Path) -> None:
    left, right = make_rows(2, 768), make_rows(2, 1280)
    save_file({"<cat>": left}, tmp_path / "learned_embeds.safetensors")
    save_file({"<cat>": right}, tmp_path / "learned_embeds_2.safetensors")

    (found,) = read_embedding(tmp_path)

    assert_same(found, Embedding("<cat>", {"clip_l": left, "clip_g": right}))
    save_file({"<dog>": right}, tmp_path / "learned_embeds_2.safetensors")
    assert set(read_embedding(tmp_path)[0].vectors) == {""}


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("My Cat", "<my-cat>"),
        ("<Cat>", "<cat>"),
        ("sks", "<sks>"),
        ("a_b.c-1", "<a_b.c-1>"),
        ("--x--", "<x>"),
    ],
)
def test_names_become_tokens(name: str, token: str) -> None:
    assert as_token(name) == token
    with pytest.raises(UserError, match="give --token"):
        as_token("猫")


def test_converted_tokens_are_lower_case_unless_named(tmp_path: Path) -> None:
    save_file({"<Cat>": make_rows(2)}, tmp_path / "in.safetensors")

    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers")
    assert set(load_file(tmp_path / "out.safetensors")) == {"<cat>"}
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers", token="<tom>")
    assert set(load_file(tmp_path / "out.safetensors")) == {"<tom>"}
    with pytest.raises(UserError, match="lower-case"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers", token="<Tom>")


FAMILY_ROWS = {
    "sd": {"": 32},
    "ldm": {"": 32},
    "sdxl": {"clip_l": 32, "clip_g": 32},
    "flux": {"clip_l": 32},
    "sd3": {"clip_l": 32, "clip_g": 32, "t5xxl": 64},
}


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_a_pipeline_uses_every_vector_after_loading(family: str) -> None:
    pipeline = tiny_pipeline(family)
    encoders = text_encoders(pipeline)
    before = {
        name: encoder.get_input_embeddings().weight[: len(tokenizer)].clone()
        for name, (tokenizer, encoder) in encoders.items()
    }
    widths = FAMILY_ROWS[family]
    vectors = {name: make_rows(3, width, seed) for seed, (name, width) in enumerate(widths.items())}

    words = load_into(pipeline, Embedding("<My Cat>", vectors))

    for name, rows in vectors.items():
        tokenizer, encoder = encoders[name] if name else next(iter(encoders.values()))
        prompt = f"a {words} here"
        if hasattr(pipeline, "maybe_convert_prompt"):
            prompt = pipeline.maybe_convert_prompt(prompt, tokenizer)
        read = encoder.get_input_embeddings()(tokenizer(prompt, return_tensors="pt").input_ids)[0]
        start = int((read == rows[0]).all(1).nonzero())
        assert torch.equal(read[start : start + 3], rows)
        known = before[name or next(iter(encoders))]
        assert torch.equal(encoder.get_input_embeddings().weight[: len(known)], known)
    size = {} if family == "ldm" else {"height": 32, "width": 32}
    drawn = pipeline(prompt=f"a {words}", num_inference_steps=1, output_type="np", **size).images
    assert drawn.shape == (1, 32, 32, 3)


def test_a_loaded_word_is_not_where_a_prompt_is_pooled() -> None:
    pipeline = tiny_pipeline("sdxl")
    inner = pipeline.text_encoder_2.text_model
    inner.eos_token_id = 2  # as published
    load_into(pipeline, make_two())
    assert inner.eos_token_id == pipeline.tokenizer_2.eos_token_id


def test_what_cannot_be_loaded_is_told_with_both_widths() -> None:
    pipeline = tiny_pipeline("sd")
    with pytest.raises(UserError, match=r"cannot load <cat>: .*width 768, but the model takes 32 \(clip_l\)"):
        load_into(pipeline, Embedding("<cat>", {"": make_rows(1, 768)}))
    with pytest.raises(UserError, match=r"width 32 \(clip_l\) and 32 \(clip_g\), but the model takes 32"):
        load_into(pipeline, make_two())
    with pytest.raises(UserError, match=r"takes 32 \(clip_l\) and 32 \(clip_g\)"):
        load_into(tiny_pipeline("sdxl"), Embedding("<cat>", {"clip_l": make_rows(1)}))
    assert len(pipeline.tokenizer) == 514  # nothing was added
    load_into(pipeline, make_one(1))
    with pytest.raises(UserError, match="exists in the model's vocabulary"):
        load_into(pipeline, make_one(1))
    pipeline.tokenizer.add_tokens("<dog>_1")
    with pytest.raises(UserError, match="one begins the other"):
        load_into(pipeline, Embedding("<dog>", {"": make_rows(2)}))


def test_base_models_are_found_by_width() -> None:
    def fits(**widths: int) -> list[str]:
        return find_base_models(Embedding("<a>", {k: make_rows(1, w) for k, w in widths.items()}))

    assert find_base_models(Embedding("<a>", {"": make_rows(1, 768)})) == ["Stable Diffusion 1", "FLUX.1"]
    assert find_base_models(Embedding("<a>", {"": make_rows(1, 1024)})) == ["Stable Diffusion 2"]
    assert fits(clip_l=768, clip_g=1280) == ["SDXL", "Stable Diffusion 3"]
    assert fits(clip_l=768, t5xxl=4096) == ["FLUX.1"]
    assert fits(clip_g=768) == []
    configuration = files("t2iprobe").joinpath("assets/embedded_model/text_encoder/config.json").read_text()
    assert BASE_MODELS["embedded"]["clip_l"] == json.loads(configuration)["hidden_size"]
    assert match_encoders({"": 4}, {"bert": 4}) == {"bert": ""}


def test_an_embedding_is_described(tmp_path: Path) -> None:
    rows = torch.stack([torch.full((768,), 2.0), torch.zeros(768)])
    save_file({"<Cat>": rows.half()}, tmp_path / "a.safetensors", {"format": "pt", "author": "me"})

    described = inspect(tmp_path / "a.safetensors")

    assert json.loads(json.dumps(described)) == described
    assert described["kind"] == "embedding"
    assert described["form"] == "diffusers"
    assert (described["token"], described["vectors"]) == ("<Cat>", 2)
    assert described["width"] == {"": 768}
    assert described["dtype"] == "float16"
    assert described["norms"] == {"": [pytest.approx(2 * 768**0.5, rel=1e-5), 0.0]}
    assert described["fits"] == ["Stable Diffusion 1", "FLUX.1"]
    assert described["metadata"]["author"] == "me"
    assert "the first vector alone" in described["notes"][0]
    for form in FORMS:
        path, *_ = write_embedding(tmp_path / name_file(form, f"b-{form}"), make_one(), form)
        assert inspect(path)["form"] == form


def predict(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    with torch.no_grad():
        return unet(noisy, 500, text).sample


def change_attention(unet: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Change the keys and values of every cross-attention; return them."""
    torch.manual_seed(0)
    changed = {}
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            for layer in (module.to_k, module.to_v):
                layer.weight.data += 0.3 * torch.randn_like(layer.weight)
            changed[name] = (module.to_k.weight.detach(), module.to_v.weight.detach())
    return changed


@pytest.mark.parametrize("named", [False, True])
def test_custom_diffusion_loads_with_diffusers_own_loader(tmp_path: Path, named: bool) -> None:
    trained, plain, ours = (tiny_pipeline("sd") for _ in range(3))
    weights = change_attention(trained.unet)
    expected, untrained = predict(trained.unet), predict(plain.unet)
    assert (expected - untrained).abs().max() > 1e-2

    path = write_custom_diffusion(
        tmp_path, weights, trained.unet.attn_processors if named else None, METADATA
    )
    plain.unet.load_attn_procs(str(tmp_path), weight_name=path.name, _pipeline=plain)
    load_custom_diffusion(ours.unet, read_custom_diffusion(tmp_path))

    assert torch.allclose(predict(plain.unet), expected, atol=1e-5)
    assert torch.equal(predict(ours.unet), expected)
    described = inspect(path)
    assert described["kind"] == "custom-diffusion"
    assert described["modules"] == sorted(weights)
    assert described["width"] == [32]
    assert described["metadata"]["stop_reason"] == METADATA["stop_reason"]


def test_custom_diffusion_that_diffusers_saved_is_read(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd")
    weights = change_attention(pipeline.unet)
    path = write_custom_diffusion(tmp_path, weights)
    pipeline.unet.load_attn_procs(str(tmp_path), weight_name=path.name, _pipeline=pipeline)
    pipeline.unet.save_attn_procs(str(tmp_path), safe_serialization=False)

    found = read_custom_diffusion(tmp_path / "pytorch_custom_diffusion_weights.bin")

    assert found.keys() == weights.keys()
    assert all(torch.equal(a, b) for name in weights for a, b in zip(found[name], weights[name], strict=True))


def test_custom_diffusion_of_another_model_changes_nothing() -> None:
    pipeline = tiny_pipeline("sd")
    before = predict(pipeline.unet)
    weights = {
        name: (key + 1, value + 1) for name, (key, value) in change_attention(tiny_pipeline().unet).items()
    }
    last = list(weights)[-1]
    key, value = weights[last]

    with pytest.raises(UserError, match=r"attn2\.to_v is \[2, 2\], this model has \[64, 32\]"):
        load_custom_diffusion(pipeline.unet, {**weights, last: (key, torch.zeros(2, 2))})
    with pytest.raises(UserError, match="this model has none"):
        load_custom_diffusion(pipeline.unet, {**weights, "nowhere.attn2": (key, value)})

    assert torch.equal(predict(pipeline.unet), before)


def add_lora(module: Any, rank: int, alpha: int, targets: list[str], **more: Any) -> LoraConfig:
    torch.manual_seed(rank)
    configuration = LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=targets, **more
    )
    module.add_adapter(configuration)
    return configuration


def encode(pipeline: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt("a cat", "cpu", 1, False)[0]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_lora_weights_are_described_and_load_in_kohyas_form(tmp_path: Path, family: str) -> None:
    trained = tiny_pipeline(family)
    parts = {"unet": (3, 6, ["to_q", "to_k", "to_v", "to_out.0"])}
    for name in ("text_encoder", "text_encoder_2")[: 1 if family == "sd" else 2]:
        parts[name] = (2, 2, ["q_proj", "k_proj", "v_proj", "out_proj"])
    arguments: dict[str, Any] = {}
    for name, (rank, alpha, targets) in parts.items():
        configuration = add_lora(getattr(trained, name), rank, alpha, targets)
        arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(getattr(trained, name))
        arguments[f"{name}_lora_adapter_metadata"] = configuration.to_dict()
    trained.save_lora_weights(str(tmp_path), **arguments)
    source = tmp_path / "pytorch_lora_weights.safetensors"
    described = inspect(source)
    assert (described["kind"], described["form"], described["rank"]) == ("lora", "diffusers", 3)
    assert described["ranks"] == [2, 3]
    assert described["components"] == {name: 32 if name == "unet" else 8 for name in parts}
    assert described["modules"] == 32 + 8 * (len(parts) - 1)

    (path,) = convert(source, tmp_path / "kohya.safetensors", "kohya")

    described = inspect(path)
    assert described["form"] == "kohya"
    assert described["alpha"] == [2.0, 6.0]
    assert described["components"]["lora_unet"] == 32
    loaded, official = tiny_pipeline(family), tiny_pipeline(family)
    loaded.load_lora_weights(str(path))
    official.load_lora_weights(str(source))
    assert_same_pipeline(loaded, trained)
    assert_same_pipeline(official, trained)


@pytest.mark.parametrize("more", [{"alpha_pattern": {"attn1.to_q": 12, "to_k": 2}}, {"use_rslora": True}])
def test_lora_keeps_its_scales_in_kohyas_form(tmp_path: Path, more: dict[str, Any]) -> None:
    trained = tiny_pipeline("sd")
    configuration = add_lora(trained.unet, 4, 6, ["to_q", "to_k", "to_v"], **more)
    trained.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(trained.unet),
        unet_lora_adapter_metadata=configuration.to_dict(),
    )
    expected = [12.0] if "use_rslora" in more else [2.0, 6.0, 12.0]
    assert inspect(tmp_path)["alpha"] == expected

    (path,) = convert(tmp_path, tmp_path / "kohya.safetensors", "kohya")

    assert inspect(path)["alpha"] == expected
    weights, count = load_file(path), 0
    for name, module in trained.unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = f"lora_unet_{name.replace('.', '_')}"
            down, up = weights[f"{base}.lora_down.weight"], weights[f"{base}.lora_up.weight"]
            added = float(weights[f"{base}.alpha"]) / len(down) * up @ down
            assert torch.allclose(added, module.get_delta_weight("default"), atol=1e-6)
            count += 1
    assert count == len(weights) / 3 > 0


def test_scales_that_stand_beside_lora_weights_are_kept(tmp_path: Path) -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    weights = {f"{name}.lora_A.weight": make_rows(4), f"{name}.lora_B.weight": make_rows(4).T.contiguous()}
    source, target = tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors"
    save_file({**weights, f"{name}.alpha": torch.tensor(1.0)}, source)

    convert(source, target, "kohya")

    module = name.replace("unet.", "lora_unet.").replace(".", "_")
    assert set(load_file(target)) == {
        f"{module}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert load_file(target)[f"{module}.alpha"] == inspect(source)["alpha"][0] == 1
    save_file({**weights, "unet.other.alpha": torch.tensor(1.0)}, source)
    with pytest.raises(UserError, match=r"it scales unet\.other without weights"):
        convert(source, target, "kohya")
    save_file(weights, source, {"lora_adapter_metadata": '["unet"]'})
    with pytest.raises(UserError, match="its lora_adapter_metadata is none"):
        convert(source, target, "kohya")


def assert_same_pipeline(loaded: Any, trained: Any) -> None:
    def run(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np").images
        )

    untrained = run(tiny_pipeline("sd" if not hasattr(trained, "text_encoder_2") else "sdxl"))
    assert (run(trained) - untrained).abs().max() > 1e-3
    assert torch.allclose(run(loaded), run(trained), atol=1e-5)


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd")
    custom = write_custom_diffusion(tmp_path, change_attention(pipeline.unet))
    (path,) = write_embedding(tmp_path / "cat.safetensors", make_one(), "a1111")

    with pytest.raises(UserError, match="did you mean a1111"):
        convert(path, tmp_path / "out.safetensors", "a1112")
    with pytest.raises(UserError, match=r"the form a1111-pt is a \.pt file: call it .*out\.pt"):
        convert(path, tmp_path / "out.safetensors", "a1111-pt")
    with pytest.raises(UserError, match="holds Custom Diffusion weights, which cannot be written as kohya"):
        convert(custom, tmp_path / "out.safetensors", "kohya")
    with pytest.raises(UserError, match="holds Custom Diffusion weights, no embedding"):
        read_embedding(custom)
    with pytest.raises(UserError, match="holds an embedding, no Custom Diffusion weights"):
        read_custom_diffusion(path)
    save_file({"lora_unet_x.lora_down.weight": make_rows(2)}, tmp_path / "k.safetensors")
    with pytest.raises(UserError, match="not of a UNet or its text encoders as diffusers names them"):
        convert(tmp_path / "k.safetensors", tmp_path / "out.safetensors", "kohya")
    with pytest.raises(UserError, match="which cannot be written as sdxl: use kohya"):
        convert(tmp_path / "k.safetensors", tmp_path / "out.safetensors", "sdxl")
    assert not (tmp_path / "out.safetensors").exists()
