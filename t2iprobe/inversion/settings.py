"""The settings of a training: one typed model, for the command line, the state and the report."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Training(BaseModel):
    """The settings of a training. None: what suits the method."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field("embedded", description="embedded, a pipeline folder, a weights file or a hub id")
    variant: str | None = Field(None, description="weight files to take, such as fp16")
    method: str = Field("textual-inversion", description="what trains")
    stop: str = Field("plateau", description="plateau, dvar, clip or budget")
    max_steps: int | None = Field(None, ge=1, description="steps at most")
    every: int | None = Field(None, ge=1, description="steps between two looks at the watched loss")
    items: int = Field(8, ge=1, description="fixed inputs of the watched loss")
    fixed: str = Field(
        "11111", description="which of images, latents, noise, captions, timesteps stay fixed in it"
    )
    batch: int | None = Field(None, ge=1, description="pictures a step")
    together: int = Field(8, ge=1, description="concepts that share a pass")
    rate: float | None = Field(None, gt=0, description="learning rate of the method's weights")
    row_rate: float | None = Field(
        None, gt=0, description="learning rate of the rows, in units of the vocabulary's root mean square"
    )
    average: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of the running average that is watched and kept; 0: the last values",
    )
    vectors: int = Field(1, ge=1, description="rows of the concept")
    init: str = Field("nearest", description="nearest, random, or words by commas")
    templates: str | list[str] = Field("object", description="object, style, or captions with {}")
    flip: bool = Field(True, description="mirror half of the pictures")
    background: str = Field("white", description="behind transparent pictures")
    size: int | None = Field(None, ge=8, description="pixels a side")
    rank: int = Field(4, ge=1, description="of LoRA")
    prior: str | None = Field(
        None, description="the word whose pictures, drawn by the model itself, hold the rest in place"
    )
    prior_pictures: int = Field(16, ge=1, description="how many of them")
    prior_weight: float = Field(1.0, ge=0, description="of their loss")
    seed: int = Field(0, ge=0, description="of everything")
    grid: int = Field(4, ge=0, description="pictures drawn at chosen steps; 0: none")
    steps: int | None = Field(None, ge=1, description="denoising steps of drawn pictures")
    guidance: float | None = Field(None, ge=0, description="guidance of drawn pictures")
    evaluate: int = Field(8, ge=0, description="pictures a prompt to evaluate at the end; 0: none")
    features: str = Field("auto", description="who compares pictures: auto, classifier, clip, clip:NAME:FILE")
    compile: bool = Field(False, description="compile the denoiser: pays for many concepts")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the networks")

    @field_validator("background")
    @classmethod
    def _check_colour(cls, name: str) -> str:
        from PIL import ImageColor

        ImageColor.getrgb(name)  # else a transparent picture would be told to be unreadable
        return name
