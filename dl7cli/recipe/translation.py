"""The recipe of a translator, and what its sections ask of one another."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from dl7cli.recipe.section import Fraction, Name, Optim, Section, Text, Training, Width

Tied = Literal["all", "output", "none"]


class PairData(Section):
    source: Text = "bentrevett/multi30k"
    """A hub id, a folder of parallel text files, TSV or JSONL, one such file, or `builtin:phrases`."""
    source_language: Text = "en"
    """The language that is read, by the name that its column, field or file has in the data."""
    target_language: Text = "de"
    """The language that is written, likewise."""
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
    train_examples: Annotated[int, Field(ge=1)] | None = None
    """How many training pairs are used, before long ones are left out; the same for every seed.

    All where it is not given.
    """

    @field_validator("subword_sampling")
    @classmethod
    def _sampling_fits(cls, amount: float, info: ValidationInfo) -> float:
        if amount > 0 and info.data.get("vocabulary") in ("word", "character"):
            raise ValueError('only subwords can be sampled: `data.vocabulary = "bpe"` or `"unigram"`')
        return amount


class Seq2SeqModel(Section):
    kind: Literal["seq2seq"]
    """Recurrent encoder and decoder, from Sutskever et al. 2014 on."""
    embedding_width: Width = 256
    """Of a word's vector."""
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """What the layers of encoder and decoder are made of."""
    encoder_width: Width = 256
    """Units of the encoder in each direction."""
    encoder_layers: Annotated[int, Field(ge=1, le=8)] = 1
    """Of the encoder, one above the other."""
    encoder_direction: Literal["both", "forward"] = "both"
    """How a sentence is read: also from its end to its beginning (Schuster & Paliwal 1997), or only forward."""
    encoder_stack: Literal["bidirectional", "alternating"] = "bidirectional"
    """Each layer reads both directions of the one below; or two stacks that turn round at each layer."""
    transition_depth: Annotated[int, Field(ge=1, le=16)] = 1
    """Cells in a step of the encoder; the first reads the input, the others only the state (Pascanu et al. 2014)."""
    decoder_width: Width = 512
    """Units of each layer of the decoder."""
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
    """Of `luong`: whether the lowest layer also reads the readout of the step before.

    Training is a quarter to two fifths slower.
    """
    readout: Literal["tanh", "maxout"] = "tanh"
    """What stands between the decoder and the output words: a layer with tanh, or the greater of each two values."""
    tied: Tied = "all"
    """Embeddings that are one matrix: of source, target and output words, of target and output words, or none."""
    readout_width: Width | None = None
    """Width of the readout where the output words are not tied; the embedding's where it is not given."""
    coverage: bool = False
    """Whether additive attention sees the sum of what it looked at before (See et al. 2017, eq. 11)."""
    copying: bool = False
    """Whether words of the source can be copied (See et al. 2017, eq. 8 and 9)."""
    dropout: Fraction = 0.3
    """Of embeddings, of what goes from layer to layer, of the encoder's outputs and of the readout."""
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
    """Vaswani et al. 2017."""
    width: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = 128
    """Of embeddings and of what every layer gives; even, as positions are pairs of a sine and a cosine."""
    heads: Annotated[int, Field(ge=1, le=64, validate_default=True)] = 4
    """Of each attention; they share the width."""
    feedforward_width: Width = 256
    """Between the two matrices that follow each attention."""
    encoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    """Each an attention over the source and two matrices."""
    decoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    """Each an attention over the target words so far, one over the source, and two matrices."""
    dropout: Fraction = 0.3
    """Of embeddings and of what attention and feed-forward layers add."""
    tied: Tied = "all"
    """Embeddings that are one matrix: of source, target and output words, of target and output words, or none."""

    norm: Literal["pre", "post"] = "pre"
    """Whether attention and matrices read what is normalised (Xiong et al. 2020), or their sums are (the paper)."""

    @field_validator("heads")
    @classmethod
    def _heads_fit(cls, heads: int, info: ValidationInfo) -> int:
        if "width" in info.data and info.data["width"] % heads:
            raise ValueError(f"the heads must share a width of {info.data['width']} evenly")
        return heads


class ConvS2SModel(Section):
    kind: Literal["convs2s"]
    """Gehring et al. 2017: gated convolutions."""
    embedding_width: Width = 256
    """Of a word's vector and of a position's."""
    width: Width = 256
    """Channels of every convolution, after its gate."""
    encoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    """Convolutions one above the other."""
    decoder_layers: Annotated[int, Field(ge=1, le=64)] = 3
    """Each with an attention of its own."""
    kernel: Annotated[int, Field(ge=1, le=15)] = 3
    """Steps that a convolution reads: around its own in the encoder, up to its own in the decoder."""
    positions: Width = 256
    """Positions that are learned, of source and of target words; all steps beyond share the last."""
    dropout: Fraction = 0.3
    """Of embeddings, of what the convolutions read and of the decoder's answer."""
    tied: Tied = "all"
    """Embeddings that are one matrix: of source, target and output words, of target and output words, or none."""


class PairTraining(Training):
    batch_tokens: Annotated[int, Field(ge=16, le=1 << 24)] = 2048
    """Most subwords in a batch, of source or of target, padding included. Sentences are padded to an even length, and
    of the number of pairs only the first four binary digits are kept (184 becomes 176), so that few shapes occur.

    With `data.subword_sampling` it bounds batches as they would be without: the sampled ones have as many pairs each,
    and more subwords, as sampled sentences are longer.
    """
    coverage_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Of the coverage loss of See et al. 2017, eq. 12 and 13, with `model.coverage`; there 1."""
    r_drop: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of R-Drop (Liang et al. 2021, arXiv 2106.14448, there 5): that two draws of dropout shall say the same.

    A step then reads every pair twice and costs twice as much. 0: none.
    """
    select: Literal["bleu", "chrf", "loss", "last"] = "bleu"
    """What the best epoch is chosen by: BLEU or chrF of greedy translations, or the least cross-entropy of a subword.

    All are of the validation split; BLEU and chrF without case with `data.lowercase`, the cross-entropy without label
    smoothing. `last`: it is the last epoch, whatever its BLEU.
    """


class Decoding(Section):
    method: Literal["beam", "sample"] = "beam"
    """The best that a beam finds, or words drawn at random by their probabilities."""
    beam: Annotated[int, Field(ge=1, le=100)] = 5
    """Hypotheses that go on at each step; 1: greedy search."""
    length_normalisation: Literal["gnmt", "average"] = "gnmt"
    """What a log-probability is divided by to rank: by Wu et al. 2016, eq. 14, or the length itself."""
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
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Of `sample`: only this many most probable words are drawn from; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of `sample`: only the fewest most probable words that together reach this probability are drawn from."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Of `sample`: with the number of the line, what the draws depend on."""

    def updated(self, **changes: Any) -> "Decoding":
        """With the `changes` that are not None: flags that were not given."""
        given = {key: value for key, value in changes.items() if value is not None}
        return type(self).model_validate(self.model_dump() | given)


class TranslationRecipe(Section):
    name: Name
    """What its runs are called after."""
    data: PairData = PairData()
    model: Annotated[Seq2SeqModel | TransformerModel | ConvS2SModel, Field(discriminator="kind")]
    training: PairTraining
    optim: Optim
    decoding: Decoding = Decoding()

    @field_validator("model")
    @classmethod
    def _model_fits(
        cls, model: Seq2SeqModel | TransformerModel | ConvS2SModel, info: ValidationInfo
    ) -> Seq2SeqModel | TransformerModel | ConvS2SModel:
        data = info.data.get("data")
        if data is not None and not data.joint:
            if model.tied == "all":
                raise ValueError('a vocabulary for each language needs `model.tied = "output"` or `"none"`')
            if isinstance(model, Seq2SeqModel) and model.copying:
                raise ValueError("copying needs one vocabulary for both languages: `data.joint = true`")
        return model

    @field_validator("training")
    @classmethod
    def _training_fits(cls, training: PairTraining, info: ValidationInfo) -> PairTraining:
        model = info.data.get("model")
        if training.coverage_weight and model is not None and not getattr(model, "coverage", False):
            raise ValueError("`training.coverage_weight` needs `model.coverage = true`")
        if training.r_drop and model is not None and model.dropout == 0:
            raise ValueError("`training.r_drop` compares two draws of dropout, and `model.dropout` is 0")
        return training

    @field_validator("decoding")
    @classmethod
    def _decoding_fits(cls, decoding: Decoding, info: ValidationInfo) -> Decoding:
        if decoding.coverage_penalty and getattr(info.data.get("model"), "attention", "") == "none":
            raise ValueError("`decoding.coverage_penalty` is of attention, and `model.attention` is none")
        return decoding

    @property
    def task(self) -> str:
        return "translation"
