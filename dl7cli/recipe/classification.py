"""The recipe of a classifier of images."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from dl7cli.recipe.section import Fraction, Name, Optim, Section, Text, Training, Width


class ImageData(Section):
    source: Text = "uoft-cs/cifar10"
    """A hub id, a folder, an image folder or `builtin:shapes`."""
    image: Text | None = None
    """Name of the image column; found by its type where it is not given."""
    label: Text | None = None
    """Name of the label column; found by its type where it is not given."""
    image_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Side in pixels that images are resized to; theirs where it is not given."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Part of the training images kept for validation where the data has no such split."""
    train_examples: Annotated[int, Field(ge=1)] | None = None
    """How many training images are used; the same for every seed. All where it is not given."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 4
    """Most pixels a training image is shifted in each direction."""
    crop_fill: Literal["mean", "reflect"] = "mean"
    """What a shift uncovers: the mean colour, or the image reflected at its outermost pixels (Jordan 2024)."""
    flip: Literal["none", "random", "alternating"] = "random"
    """How training images are mirrored; `alternating`: half of them in one epoch, the other half in the next."""
    cutout: Annotated[int, Field(ge=0, le=512)] = 0
    """Side in pixels of a square blotted out of every training image; 0: none."""
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a rectangle of a training image is filled with noise."""


def _depths(stages: int, block: str, preactivation: bool) -> tuple[str, list[int]]:
    """Which depths there are, in words, and all of them up to a depth that none will train."""
    match stages, block:
        case 4, "basic":
            return "one of 18, 34 (50, 101 and 152 have bottleneck blocks)", [18, 34]
        case 4, _:
            return "one of 50, 101, 152 (18 and 34 have basic blocks)", [50, 101, 152]
        case _, "bottleneck":
            return "9n+2 (11, 20, 29, …) with bottleneck blocks", list(range(11, 10_000, 9))
        case _ if preactivation:
            both = "6n+2 (8, 14, 20, …) or, counting the three projections, 6n+4 (10, 16, 22, …)"
            return both, [*range(8, 10_000, 6), *range(10, 10_000, 6)]
        case _:
            return "6n+2 (8, 14, 20, …)", list(range(8, 10_000, 6))


class ResNetModel(Section):
    kind: Literal["resnet"]
    """He et al. 2015 and what was made of it since: residual networks and their plain counterparts."""
    stages: Literal[3, 4] = 3
    """3: stages of n blocks each, for small images; 4: ResNet-18 to 152 (He et al. 2015, table 1)."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions, or a 1x1, a 3x3 and a 1x1 one with four times as many channels outside as inside."""
    preactivation: bool = False
    """Whether normalisation and activation precede each convolution (He et al. 2016)."""
    depth: Annotated[int, Field(validate_default=True)] = 20
    """Layers with weights: 6n+2 (He et al. 2015, §4.2), 9n+2 of bottlenecks, 6n+4 of wide networks."""
    residual: bool = True
    """Whether blocks have shortcuts; without them it is the plain net."""
    shortcut: Literal["A", "B"] = "A"
    """Where the shape changes: A subsamples and pads with zeros, B is a 1x1 convolution."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """A 3x3 convolution, or a 7x7 one of stride 2 with max-pooling for images of 64 pixels and more."""
    width: Annotated[int, Field(ge=1, le=4096)] = 16
    """Channels after the stem and in the first stage; each stage has twice as many as the one before."""
    widening: Annotated[int, Field(ge=1, le=64)] = 1
    """How many times more channels the blocks have (Zagoruyko & Komodakis 2016)."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 1
    """Groups of the 3x3 convolution of a bottleneck (Xie et al. 2017)."""
    group_width: Annotated[int | None, Field(ge=1, le=4096, validate_default=True)] = None
    """Channels of a group in the first stage; the block's own where it is not given."""
    squeeze_excitation: Annotated[int, Field(ge=0, le=1024)] = 0
    """Reduction of squeeze and excitation (Hu et al. 2018), often 16; 0: none."""
    dropout: Fraction = 0.0
    """Part of what the second convolution of each block reads that is dropped."""
    survival: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that the last block takes part in a step; from 1 it falls linearly to it (Huang et al. 2016)."""
    activation: Literal[
        "relu", "leaky_relu", "prelu", "elu", "gelu", "swish", "su", "mish",
        "tanh", "sigmoid", "hardtanh", "softsign", "maxout", "glu",
    ] = "relu"  # fmt: skip
    """What stands between the convolutions."""
    pieces: Annotated[int, Field(ge=2, le=64)] = 2
    """Inputs that Maxout takes the greatest of."""
    beta: float = 1.0
    """β of Swish, x·σ(βx)."""
    learned_beta: bool = False
    """Whether every channel of Swish learns its own β, starting from `beta`."""
    match: Literal["width", "parameters"] = "width"
    """What Maxout and GLU, which take several inputs, leave as it is with ReLU: channels, or the parameter count."""
    checkpointing: bool = False
    """Whether activations inside blocks are computed again for the gradient: less memory, about a third slower."""

    @field_validator("depth")
    @classmethod
    def _depth_fits(cls, depth: int, info: ValidationInfo) -> int:
        if {"stages", "block", "preactivation"} <= info.data.keys():
            data = info.data
            allowed, depths = _depths(data["stages"], data["block"], data["preactivation"])
            if depth not in depths:
                near = min(depths, key=lambda known: abs(known - depth))
                other = (
                    "; ResNet-18 and its like have `model.stages = 4`"
                    if data["stages"] == 3 and depth in (18, 34, 50, 101, 152)
                    else ""
                )
                raise ValueError(f"depth must be {allowed}; the nearest is {near}{other}")
        return depth

    @field_validator("groups")
    @classmethod
    def _groups_fit(cls, groups: int, info: ValidationInfo) -> int:
        if groups > 1 and info.data.get("block") == "basic":
            raise ValueError('groups need `model.block = "bottleneck"`')
        return groups

    @field_validator("group_width")
    @classmethod
    def _group_width_fits(cls, width: int | None, info: ValidationInfo) -> int | None:
        if width is None and info.data.get("groups", 1) > 1:
            raise ValueError(f"{info.data['groups']} groups need a width, such as `model.group_width = 64`")
        if width is not None and info.data.get("block") == "basic":
            raise ValueError('a group width needs `model.block = "bottleneck"`')
        return width

    @field_validator("pieces", "beta", "learned_beta")
    @classmethod
    def _fits_the_activation(cls, value: float, info: ValidationInfo) -> float:
        assert info.field_name is not None
        needed = "maxout" if info.field_name == "pieces" else "swish"
        if value != cls.model_fields[info.field_name].default and info.data.get("activation", needed) != needed:
            raise ValueError(f'it needs `model.activation = "{needed}"`')
        return value

    @field_validator("survival")
    @classmethod
    def _survival_fits(cls, survival: float, info: ValidationInfo) -> float:
        if survival < 1 and info.data.get("residual") is False:
            raise ValueError("without shortcuts nothing is left where a block takes no part: it must be 1")
        return survival


class FastResNetModel(Section):
    kind: Literal["fast_resnet"]
    """A wide residual network that begins with a whitening layer, for few epochs."""
    widths: Annotated[tuple[Width, ...], Field(strict=False, min_length=1, max_length=3)] = (
        64,
        256,
        256,
    )
    """Channels of the stages."""


class ImageTraining(Training):
    select: Literal["accuracy", "last"] = "accuracy"
    """Which epoch is kept as `best` and evaluated: the most accurate on validation, or the last, whatever it has."""
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    """Images of a step, of all workers together."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Each batch is blended with itself in another order, by a weight from Beta(mixup, mixup); 0: never."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """A rectangle comes from another image, its area from Beta(cutmix, cutmix); with `mixup` too, one or the other."""
    small_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Side in pixels that training images are shrunk to in the first `small_part` of all steps."""
    small_part: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Part of all steps that have images of `small_size`, where it is given."""
    batch_norm: Literal["local", "sync"] = "local"
    """On several workers, whether each normalises by its own part of a batch or all by the whole batch, as one would.

    With `local` the running statistics, which evaluation uses, are those of the first worker.
    """
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether the model is compiled before the first step; `auto`: where the steps repay it. Never where batches are
    taken in parts, or by several workers with `batch_norm = "sync"`.
    """


class Evaluation(Section):
    flip: bool = False
    """Whether the scores of an image are averaged with those of its mirror image."""
    shift: Annotated[int, Field(ge=0, le=8)] = 0
    """Pixels by which the image is also shown shifted, up left and down right.

    The mean of these two is half of its score (Jordan 2024, arXiv 2404.00498).
    """


class ClassificationRecipe(Section):
    name: Name
    """What its runs are called after."""
    data: ImageData = ImageData()
    model: Annotated[ResNetModel | FastResNetModel, Field(discriminator="kind")]
    training: ImageTraining
    optim: Optim
    evaluation: Evaluation = Evaluation()

    @property
    def task(self) -> str:
        return "classification"
