"""Recipes: what is trained, as TOML files checked against a schema. Knows no torch and no data.

A recipe has five sections: `data`, `model`, `training`, `optim`, and `evaluation` or, for translation, `decoding`. A
sixth table of the file, `fallback`, holds the keys that change when the built-in set stands in for the recipe's data.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dl7cli.errors import UserError


class Section(BaseModel):
    """One table of a recipe: frozen, and any key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Tied = Literal["all", "output", "none"]


class ImageData(Section):
    source: str = "uoft-cs/cifar10"
    """A hub id, a folder, an image folder or `builtin:shapes`."""
    image: str | None = None
    """Name of the image column; found by its type where it is not given."""
    label: str | None = None
    """Name of the label column; found by its type where it is not given."""
    image_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Side in pixels that images are resized to; theirs where it is not given."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Part of the training images kept for validation where the data has no such split."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 4
    """Most pixels a training image is shifted in each direction."""
    flip: Literal["none", "random", "alternating"] = "random"
    """How training images are mirrored; `alternating`: half of them in one epoch, the other half in the next."""
    cutout: Annotated[int, Field(ge=0, le=512)] = 0
    """Side in pixels of a square blotted out of every training image; 0: none."""
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a rectangle of a training image is filled with noise."""


class PairData(Section):
    source: str = "bentrevett/multi30k"
    """A hub id, a folder of parallel text files, TSV or JSONL, one such file, or `builtin:phrases`."""
    source_language: str = "en"
    target_language: str = "de"
    lowercase: bool = False
    """Whether the model reads and writes lower case alone; the references of a score stay as they are."""
    vocabulary: Literal["bpe", "unigram", "word", "character"] = "bpe"
    """Subwords (Sennrich et al. 2016; Kudo 2018), or the most frequent words and punctuation marks, or characters."""
    vocabulary_size: Annotated[int, Field(ge=32, le=64000)] = 6000
    """Most entries of a vocabulary, four special ones included; fewer where the training text does not hold as many."""
    joint: bool = True
    """Whether one vocabulary serves both languages; otherwise each has one of that size."""
    subword_sampling: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How training sentences are cut into subwords at random; 0: not at all.

    Of `bpe` the probability that a merge is left out (Provilkov et al. 2020), usually 0.1; of `unigram` the exponent of
    a segmentation's probability (Kudo 2018), usually 0.2: the smaller, the more random.
    """
    source_order: Literal["forward", "reversed", "doubled"] = "forward"
    """How a source is read: as it is, reversed (Sutskever et al. 2014, §3.3) or twice (Zaremba & Sutskever 2014)."""
    max_length: Annotated[int, Field(ge=8, le=1000)] = 100
    """Most subwords of a sentence, also of one read twice: longer training pairs are left out, longer input is cut."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Part of the training pairs kept for validation where the data has no such split."""

    @field_validator("subword_sampling")
    @classmethod
    def _sampling_fits(cls, amount: float, info: ValidationInfo) -> float:
        if amount > 0 and info.data.get("vocabulary") in ("word", "character"):
            raise ValueError('only subwords can be sampled: `data.vocabulary = "bpe"` or `"unigram"`')
        return amount


def _depths(stages: int, block: str, preactivation: bool) -> tuple[str, list[int]]:
    """Which depths there are, in words, and all of them up to a depth that none will train."""
    match stages, block:
        case 4, "basic":
            return "one of 18, 34 (50, 101 and 152 have bottleneck blocks)", [18, 34]
        case 4, _:
            return "one of 50, 101, 152 (18 and 34 have basic blocks)", [50, 101, 152]
        case _, "bottleneck":
            return "9n+2 (11, 20, 29, …) with bottleneck blocks", list(range(11, 100_000, 9))
        case _ if preactivation:
            both = "6n+2 (8, 14, 20, …) or, counting the three projections, 6n+4 (10, 16, 22, …)"
            return both, [*range(8, 100_000, 6), *range(10, 100_000, 6)]
        case _:
            return "6n+2 (8, 14, 20, …)", list(range(8, 100_000, 6))


class ResNetModel(Section):
    kind: Literal["resnet"]
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
    """Before the second convolution of each block."""
    survival: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that the last block takes part in a step; from 1 it falls linearly to it (Huang et al. 2016)."""
    activation: Literal[
        "relu", "leaky_relu", "prelu", "elu", "gelu", "swish", "su", "mish",
        "tanh", "sigmoid", "hardtanh", "softsign", "maxout", "glu",
    ] = "relu"  # fmt: skip
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
                raise ValueError(f"depth must be {allowed}; the nearest is {near}")
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

    @field_validator("survival")
    @classmethod
    def _survival_fits(cls, survival: float, info: ValidationInfo) -> float:
        if survival < 1 and info.data.get("residual") is False:
            raise ValueError("without shortcuts nothing is left where a block takes no part: it must be 1")
        return survival


class FastResNetModel(Section):
    kind: Literal["fast_resnet"]
    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1, max_length=3)] = (
        64,
        256,
        256,
    )
    """Channels of the stages."""


class Seq2SeqModel(Section):
    kind: Literal["seq2seq"]
    embedding_width: Annotated[int, Field(ge=1)] = 256
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """Of encoder and decoder."""
    encoder_width: Annotated[int, Field(ge=1)] = 256
    """Units of the encoder in each direction."""
    encoder_layers: Annotated[int, Field(ge=1, le=8)] = 1
    encoder_direction: Literal["both", "forward"] = "both"
    encoder_stack: Literal["bidirectional", "alternating"] = "bidirectional"
    """Each layer reads both directions of the one below; or two stacks that turn round at each layer."""
    transition_depth: Annotated[int, Field(ge=1, le=16)] = 1
    """Cells in a step of the encoder; the first reads the input, the others only the state (Pascanu et al. 2014)."""
    decoder_width: Annotated[int, Field(ge=1)] = 512
    residual: bool = False
    """Whether each layer but the first adds its input to what it gives, in encoder and decoder."""
    attention: Literal["none", "additive", "dot", "general", "concat", "multihead"] = "general"
    """`none`: the final states of the encoder start the decoder (Sutskever et al. 2014)."""
    heads: Annotated[int, Field(ge=1, le=64, validate_default=True)] = 4
    """Of `multihead`."""
    decoder: Literal["conditional", "luong", "bahdanau"] = "conditional"
    """Attention between the two lowest layers, above the layers, or below them; without attention all are the same."""
    decoder_layers: Annotated[int, Field(ge=1, le=8, validate_default=True)] = 1
    """Of `conditional` one more: its first layer is two, with the attention between them."""
    input_feeding: bool = False
    """Of `luong`: whether the lowest layer also reads the readout of the step before; about a quarter slower."""
    readout: Literal["tanh", "maxout"] = "tanh"
    """What stands between the decoder and the output words: a layer with tanh, or the greater of each two values."""
    tied: Tied = "all"
    """Embeddings that are one matrix: of source, target and output words, of target and output words, or none."""
    readout_width: Annotated[int, Field(ge=1)] | None = None
    """Width of the readout where the output words are not tied; the embedding's where it is not given."""
    coverage: bool = False
    """Whether additive attention sees the sum of what it looked at before (See et al. 2017, eq. 11)."""
    copying: bool = False
    """Whether words of the source can be copied (See et al. 2017, eq. 8 and 9)."""
    dropout: Fraction = 0.3
    locked_dropout: bool = False
    """Whether what is dropped is the same at every step of a sentence (Gal & Ghahramani 2016)."""

    @field_validator("encoder_stack")
    @classmethod
    def _stack_fits(cls, stack: str, info: ValidationInfo) -> str:
        if stack == "alternating" and info.data.get("encoder_direction") == "forward":
            raise ValueError('stacks that alternate need `model.encoder_direction = "both"`')
        return stack

    @field_validator("attention")
    @classmethod
    def _attention_fits(cls, attention: str, info: ValidationInfo) -> str:
        memory = _memory_width(info.data)
        if attention == "dot" and memory and memory != info.data.get("decoder_width", memory):
            raise ValueError(f"dot products need `model.decoder_width = {memory}`, the width of the encoder's outputs")
        return attention

    @field_validator("heads")
    @classmethod
    def _heads_fit(cls, heads: int, info: ValidationInfo) -> int:
        memory = _memory_width(info.data)
        if info.data.get("attention") == "multihead" and memory % heads:
            raise ValueError(f"the width of the encoder's outputs, {memory}, must be a multiple of the heads")
        return heads

    @field_validator("decoder_layers")
    @classmethod
    def _decoder_layers_fit(cls, layers: int, info: ValidationInfo) -> int:
        encoder_layers = info.data.get("encoder_layers", layers)
        if info.data.get("attention") == "none" and layers != encoder_layers:
            raise ValueError(f"without attention it must be `model.encoder_layers`, {encoder_layers}")
        return layers

    @field_validator("input_feeding")
    @classmethod
    def _input_feeding_fits(cls, fed: bool, info: ValidationInfo) -> bool:
        if fed and (info.data.get("attention") == "none" or info.data.get("decoder", "luong") != "luong"):
            raise ValueError('it needs attention and `model.decoder = "luong"`')
        return fed

    @field_validator("readout_width")
    @classmethod
    def _readout_width_fits(cls, width: int | None, info: ValidationInfo) -> int | None:
        if width not in (None, info.data.get("embedding_width", width)) and info.data.get("tied", "none") != "none":
            raise ValueError('another width than `model.embedding_width` needs `model.tied = "none"`')
        return width

    @field_validator("coverage")
    @classmethod
    def _coverage_fits(cls, coverage: bool, info: ValidationInfo) -> bool:
        if coverage and info.data.get("attention", "concat") not in ("additive", "concat"):
            raise ValueError('it needs `model.attention = "additive"`')
        return coverage

    @field_validator("copying")
    @classmethod
    def _copying_fits(cls, copying: bool, info: ValidationInfo) -> bool:
        if copying and info.data.get("attention") == "none":
            raise ValueError("what is copied is what attention looks at: it needs `model.attention`")
        return copying


def _memory_width(model: dict[str, Any]) -> int:
    """Width of the outputs of a recurrent encoder, 0 where a key it depends on is wrong itself."""
    directions = {"both": 2, "forward": 1}.get(model.get("encoder_direction", ""), 0)
    return directions * int(model.get("encoder_width", 0))


class TransformerModel(Section):
    kind: Literal["transformer"]
    width: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = 128
    """Of embeddings and of what every layer gives; even, as positions are pairs of a sine and a cosine."""
    heads: Annotated[int, Field(ge=1, le=64, validate_default=True)] = 4
    """Of each attention; they share the width."""
    feedforward_width: Annotated[int, Field(ge=1)] = 256
    """Between the two matrices that follow each attention."""
    encoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    decoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    dropout: Fraction = 0.3
    """Of embeddings and of what attention and feed-forward layers add."""
    tied: Tied = "all"
    """Embeddings that are one matrix: of source, target and output words, of target and output words, or none."""

    @field_validator("heads")
    @classmethod
    def _heads_fit(cls, heads: int, info: ValidationInfo) -> int:
        if "width" in info.data and info.data["width"] % heads:
            raise ValueError(f"the heads must share a width of {info.data['width']} evenly")
        return heads


class ConvS2SModel(Section):
    kind: Literal["convs2s"]
    embedding_width: Annotated[int, Field(ge=1)] = 256
    width: Annotated[int, Field(ge=1)] = 256
    """Channels of every convolution, after its gate."""
    encoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    decoder_layers: Annotated[int, Field(ge=1, le=64)] = 3
    """Each with an attention of its own."""
    kernel: Annotated[int, Field(ge=1, le=15)] = 3
    """Steps that a convolution reads: around its own in the encoder, up to its own in the decoder."""
    positions: Annotated[int, Field(ge=1)] = 256
    """Positions that are learned, of source and of target words; all steps beyond share the last."""
    dropout: Fraction = 0.3
    """Of embeddings, of what the convolutions read and of the decoder's answer."""
    tied: Tied = "all"
    """Embeddings that are one matrix: of source, target and output words, of target and output words, or none."""


class Training(Section):
    epochs: Annotated[int, Field(ge=1)]
    label_smoothing: Fraction = 0.0
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A checkpoint is written after every epoch and at least this often."""
    ema_decay: Fraction = 0.0
    """Validated and used is a moving average of the weights, this much of it the one before; 0: none."""
    keep_last: Annotated[int, Field(ge=0, le=1000)] = 0
    """How many of the last epochs keep a checkpoint for `dl7 average`, each as large on disk as `best`; 0: none."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1


class ImageTraining(Training):
    batch_size: Annotated[int, Field(ge=1)] = 128
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Each batch is blended with itself in another order, by a weight from Beta(mixup, mixup); 0: never."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """A rectangle comes from another image, its area from Beta(cutmix, cutmix); with `mixup` too, one or the other."""
    small_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Side in pixels that training images are shrunk to in the first `small_part` of all steps."""
    small_part: Annotated[float, Field(ge=0, le=1)] = 0.5
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether the model is compiled before the first step; `auto`: where the steps repay it."""


class PairTraining(Training):
    batch_tokens: Annotated[int, Field(ge=16)] = 2048
    """Most subwords in a batch, of source or of target, padding included."""
    coverage_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Of the coverage loss of See et al. 2017, eq. 12 and 13, with `model.coverage`; there 1."""
    select: Literal["bleu", "chrf", "loss"] = "bleu"
    """What the best epoch is chosen by: BLEU or chrF of greedy translations, or the least cross-entropy of a subword.

    All are of the validation split; the cross-entropy is without label smoothing.
    """


class Optim(Section):
    name: Literal["sgd", "adamw", "muon"]
    """`sgd` is with Nesterov momentum; `muon` is for the filters of convolutions, with `sgd` for everything else."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The greatest one, reached at the end of the warm-up."""
    other_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of `muon`: the rate of what is not the filters of a convolution; theirs where it is not given."""
    momentum: Fraction = 0.9
    """Of `sgd` and `muon`; the first beta of `adamw`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to biases and normalisation parameters, nor by `muon` to the filters, whose norm it keeps."""
    schedule: Literal["constant", "linear", "cosine", "step", "one-cycle", "inverse-sqrt"] = "cosine"
    """How the learning rate falls from its greatest value, to zero but for `constant`, `step` and `inverse-sqrt`.

    `step`: by `factor` at each of `milestones`; `one-cycle`: by half a cosine, after rising by half a cosine;
    `inverse-sqrt`: as one over the square root of the step.
    """
    milestones: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (0.5, 0.75)
    """Of `step`: parts of all steps, as 32,000 and 48,000 of 64,000 in He et al. 2015."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of `step`: what the learning rate is multiplied by."""
    warmup: Fraction = 0.05
    """Part of all steps over which the learning rate rises from zero."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Gradients are scaled down to this norm; 0: never."""


class Decoding(Section):
    method: Literal["beam", "sample"] = "beam"
    """The best that a beam finds, or words drawn at random by their probabilities."""
    beam: Annotated[int, Field(ge=1, le=100)] = 5
    length_normalisation: Literal["gnmt", "average", "none"] = "gnmt"
    """What a log-probability is divided by to rank: by Wu et al. 2016, eq. 14, the length itself, or nothing."""
    length_penalty: Annotated[float, Field(ge=0, le=5)] = 0.6
    """Exponent of what `length_normalisation` divides by: 0 is none, more gives longer output."""
    coverage_penalty: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Weight of the coverage penalty of Wu et al. 2016, eq. 14; 0: none."""
    min_length: Annotated[int, Field(ge=0, le=1000)] = 0
    """Fewest subwords of a translation, as far as the greatest length allows."""
    max_length_ratio: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Most subwords of a translation: this for each subword of the source, and `max_length_offset` more."""
    max_length_offset: Annotated[int, Field(ge=0, le=1000)] = 10
    """With a ratio of 0, the most subwords whatever the source."""
    no_repeat_ngram: Annotated[int, Field(ge=0, le=20)] = 0
    """No sequence of this many subwords appears twice in a translation; 0: any may."""
    allow_unknown: bool = False
    """Whether the unknown word may be an answer."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Of `sample`: logits are divided by it; below 1 the probable becomes more so."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Of `sample`: only this many most probable words are drawn from; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of `sample`: only the fewest most probable words that together reach this probability are drawn from."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Of `sample`: with the number of the line, what the draws depend on."""

    def updated(self, **changes: Any) -> "Decoding":
        """With the `changes` that are not None: flags that were not given."""
        given = {key: value for key, value in changes.items() if value is not None}
        return type(self).model_validate(self.model_dump() | given)


class Evaluation(Section):
    flip: bool = False
    """Whether the scores of an image are averaged with those of its mirror image."""
    shift: Annotated[int, Field(ge=0, le=8)] = 0
    """Pixels by which the image is also shifted, up left and down right, its scores being averaged with theirs."""


class ClassificationRecipe(Section):
    name: str
    data: ImageData = ImageData()
    model: Annotated[ResNetModel | FastResNetModel, Field(discriminator="kind")]
    training: ImageTraining
    optim: Optim
    evaluation: Evaluation = Evaluation()

    @property
    def task(self) -> str:
        return "classification"


_PairModel = Seq2SeqModel | TransformerModel | ConvS2SModel


def _without_muon(optim: Optim) -> Optim:
    if optim.name == "muon":
        raise ValueError("`muon` is for the filters of convolutions, of which this model has none")
    return optim


def _with_coverage(training: PairTraining, info: ValidationInfo) -> PairTraining:
    model = info.data.get("model")
    covers = isinstance(model, Seq2SeqModel) and model.coverage
    if training.coverage_weight and model is not None and not covers:
        raise ValueError("`training.coverage_weight` needs `model.coverage = true`")
    return training


def _with_its_vocabularies(model: _PairModel, info: ValidationInfo) -> _PairModel:
    data = info.data.get("data")
    if data is not None and not data.joint:
        if model.tied == "all":
            raise ValueError('a vocabulary for each language needs `model.tied = "output"` or `"none"`')
        if isinstance(model, Seq2SeqModel) and model.copying:
            raise ValueError("copying needs one vocabulary for both languages: `data.joint = true`")
    return model


class TranslationRecipe(Section):
    name: str
    data: PairData = PairData()
    model: Annotated[_PairModel, Field(discriminator="kind"), AfterValidator(_with_its_vocabularies)]
    training: Annotated[PairTraining, AfterValidator(_with_coverage)]
    optim: Annotated[Optim, AfterValidator(_without_muon)]
    decoding: Decoding = Decoding()

    @field_validator("decoding")
    @classmethod
    def _coverage_fits(cls, decoding: Decoding, info: ValidationInfo) -> Decoding:
        if decoding.coverage_penalty and getattr(info.data.get("model"), "attention", "") == "none":
            raise ValueError("`coverage_penalty` is of attention, and `model.attention` is none")
        return decoding

    @property
    def task(self) -> str:
        return "translation"


Recipe = ClassificationRecipe | TranslationRecipe
_BY_KIND: dict[str, type[ClassificationRecipe] | type[TranslationRecipe]] = {
    "resnet": ClassificationRecipe,
    "fast_resnet": ClassificationRecipe,
    "seq2seq": TranslationRecipe,
    "transformer": TranslationRecipe,
    "convs2s": TranslationRecipe,
}


class Resolved(NamedTuple):
    recipe: Recipe
    fallback: Recipe | None
    """The same recipe on the built-in set, where the data was not asked for by name and the file names such a set."""


def resolve(name: str, overrides: Sequence[str] = (), *, data: str | None = None, seed: int | None = None) -> Resolved:
    """Load the recipe called `name` (shipped, or a TOML file) and apply `key.path=value` overrides, which win.

    Raises UserError for a recipe that does not exist, a file that is not TOML, and, all at once, for every key that is
    unknown or has a value out of its range.
    """
    path = find(name)
    document = _read(path)
    document.setdefault("name", path.stem)
    fallback = dict(_flat(document.pop("fallback", {})))
    mistakes: list[str] = ["`fallback` must be a table of keys"] if "" in fallback else []
    changes: list[tuple[list[str], Any]] = []
    if data is not None:
        changes.append((["data", "source"], data))
    if seed is not None:
        changes.append((["training", "seed"], seed))
    for text in overrides:
        try:
            changes.append(parse_override(text))
        except ValueError as error:
            mistakes.append(str(error))
    standing_in = [(key.split("."), value) for key, value in fallback.items()]
    own = _changed(document, changes, mistakes)
    built_in = fallback.get("data.source")
    if built_in is not None and ("data.source", built_in) in _flat(own):
        own = _changed(document, [*standing_in, *changes], [])
    recipe = from_document(own, mistakes, origin=f"recipe `{name}`")
    asked = any(path == ["data", "source"] for path, _ in changes)
    if built_in is None or asked:
        return Resolved(recipe, None)
    other = _changed(document, [*standing_in, *changes], [])
    return Resolved(recipe, from_document(other, origin=f"recipe `{name}`"))


def from_document(document: dict[str, Any], mistakes: Iterable[str] = (), *, origin: str) -> Recipe:
    """The recipe a plain dictionary describes; `mistakes` found before are reported together with those found here."""
    found = list(mistakes)
    model = document.get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    schema = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if schema is None:
        seen = "is missing" if kind is None else f"is {_show(kind)}"
        found.append(f"`model.kind` {seen}; it must be one of {_choices(_BY_KIND)}{_suggest(str(kind), _BY_KIND)}")
    else:
        try:
            recipe = schema.model_validate(document)
        except ValidationError as error:
            found.extend(_explain(item, schema) for item in error.errors())
        else:
            if not found:
                return recipe
    what = "one mistake" if len(found) == 1 else f"{len(found)} mistakes"
    raise UserError(
        "\n  ".join([f"{origin} has {what}:", *found]),
        hint="`dl7 recipes show NAME` prints every key with its value",
    )


def to_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries; `from_document` gives the same recipe back."""
    return recipe.model_dump(exclude_none=True)


def unset_keys(recipe: Recipe) -> list[str]:
    """The keys that have no value, which TOML cannot write down."""
    return [key for key, value in _flat(recipe.model_dump()) if value is None]


def to_toml(recipe: Recipe) -> str:
    """The recipe with every key, as a TOML file that `resolve` reads back to the same recipe."""
    return tomli_w.dumps(to_document(recipe))


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `key.path=value` at its first `=` and read the value as TOML, or else as the text it is.

    Raises ValueError where there is no `=` or the key is not names joined by dots.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"`--set {text}` has no `=`; write `--set key.path=value`")
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key.strip()):
        raise ValueError(f"`--set {text}`: `{key}` is not a key such as `optim.learning_rate`")
    return key.strip().split("."), _value(value.strip())


def folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that come with dl7, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """The file of a shipped recipe's name or of a path ending in `.toml`."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UserError(f"there is no recipe file `{name}`", hint="`dl7 recipes list` shows the shipped ones")
        return Path(name)
    if name not in shipped():
        raise UserError(
            f"there is no recipe `{name}`{_suggest(name, shipped())}",
            hint=f"the shipped recipes are {_choices(shipped())}; a file of your own must end in `.toml`",
        )
    return folder() / f"{name}.toml"


def header(name: str) -> list[str]:
    """The comment lines at the top of a recipe's file: what it reproduces, its command, its cost and its score."""
    lines = []
    for line in find(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` is not a TOML file: {error}", hint="`dl7 recipes copy resnet` writes one") from None
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from None


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _changed(document: dict[str, Any], changes: Iterable[tuple[list[str], Any]], mistakes: list[str]) -> dict[str, Any]:
    """A copy of `document` with the changes made; a path that leads through a plain value is added to `mistakes`."""
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    for path, value in changes:
        table: Any = copy
        for name in path[:-1]:
            table = table.setdefault(name, {}) if isinstance(table, dict) else table
        if isinstance(table, dict):
            table[path[-1]] = value
        else:
            mistakes.append(f"`{'.'.join(path)}` leads through a key that holds a value")
    return copy


def _flat(table: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested tables with their dotted keys."""
    if not isinstance(table, dict):
        return [(prefix.removesuffix("."), table)]
    return [leaf for key, value in table.items() for leaf in _flat(value, f"{prefix}{key}.")]


def _explain(error: Any, schema: type[BaseModel]) -> str:
    """One pydantic error as a line that names the key, what was seen and what is allowed."""
    location = [str(part) for part in error["loc"]]
    if location[:1] == ["model"] and location[1:2] and location[1] in _BY_KIND:
        del location[1]  # pydantic puts the kind there
    key = ".".join(location)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key `{key}`{_suggest(key, _keys(schema))}"
        case "missing":
            return f"`{key}` is missing"
        case _:
            reason = str(error["msg"]).removeprefix("Value error, ")
            return f"`{key}` is {_show(error['input'])}: {reason[:1].lower()}{reason[1:]}"


def _keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key path of a schema, sections included."""
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(prefix + name)
        for section in (field.annotation, *get_args(field.annotation)):  # itself, or one of several kinds
            if isinstance(section, type) and issubclass(section, BaseModel):
                paths.extend(_keys(section, f"{prefix}{name}."))
    return paths


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def _choices(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"`{text if len(text) <= 60 else text[:57] + '…'}`"
