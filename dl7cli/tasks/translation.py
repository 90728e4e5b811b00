"""Translation: where a recipe meets its sentence pairs, a sequence-to-sequence model, search and BLEU."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dl7cli.data.sources import Progress, silent
from dl7cli.data.vocabulary import EOS, PAD, UNKNOWN
from dl7cli.device import Runtime, each_alone, evaluation_mode
from dl7cli.errors import UserError
from dl7cli.metrics import Scores, bleu, chrf, translation
from dl7cli.models.convolutional import ConvS2S
from dl7cli.models.losses import agreeing_cross_entropy, smoothed_cross_entropy
from dl7cli.models.seq2seq import Seq2Seq, Seq2SeqOptions
from dl7cli.models.transformer import Transformer
from dl7cli.models.translator import Translator
from dl7cli.recipe import ConvS2SModel, Decoding, Seq2SeqModel, TransformerModel, TranslationRecipe
from dl7cli.search import Extension, Hypothesis
from dl7cli.tasks.checking import PairAssets, built, check_assets
from dl7cli.tasks.decoding import search, teacher_forced
from dl7cli.tasks.sentences import PairBatch, SentencePairs, even, fill

HYPOTHESES_AT_ONCE = 640
"""Sentences searched at once by a thread times the beam, of sources up to `_SHORT`; of up to twice that half as many,
and so on.
"""
_SHORT = 64
"""Subwords as the model reads them, `</s>` included."""
SUBWORDS_AT_ONCE = 8192
"""Most subwords of a batch that is scored, padding included."""
ROWS_TOGETHER = 64
"""Where oneDNN writes code for every new shape, a multiple of so many subwords of a training batch are given scores."""

SAMPLE = 500
"""Characters of a text that every epoch's record keeps."""


class Candidate(NamedTuple):
    """One translation of a line."""

    text: str
    score: float
    """What ranks: the log-probability through the length penalty, and the coverage penalty."""
    log_probability: float
    tokens: list[str]
    """Target subwords, `</s>` included."""
    token_log_probabilities: list[float]
    attention: np.ndarray | None
    """(tokens, source tokens) in float32; None where it was not asked for or the model looks at nothing."""


class TranslatedLine(NamedTuple):
    text: str
    score: float
    """Of the best; 0 for a blank line, -inf where every output has probability 0 and the text is empty."""
    source_tokens: list[str]
    """As the model reads them, `</s>` included; none of a blank line."""
    alternatives: list[Candidate]
    """The n best, the first included, as far as there are; none for a blank line."""
    cut: int | None
    """To how many subwords the line was cut, where the models read no more."""
    unknown: bool
    """Whether the line has characters or words that the vocabulary has not."""


class Branch(NamedTuple):
    """A hypothesis among the best twice as many as the beam of a step, by the token that it adds to its parent."""

    parent: int | None
    """The number of the branch that it goes on from; None where it begins the translation."""
    step: int
    """From 1."""
    token: str
    log_probability: float
    """Of the whole hypothesis."""
    score: float | None
    """What ranks it, where it ended here."""
    lives: bool
    """Whether the beam went on with it."""


class ScoredPair(NamedTuple):
    """What the model says of a given translation."""

    log_probability: float
    tokens: list[str]
    """Target subwords, `</s>` included."""
    token_log_probabilities: list[float]
    cut: int | None
    """To how many subwords the source was cut, where the models read no more."""
    unknown: bool
    """Whether either has characters or words that the vocabulary has not."""

    @property
    def perplexity(self) -> float | None:
        """Of a subword."""
        return perplexity(self.log_probability, len(self.tokens))


def perplexity(log_probability: float, tokens: int) -> float | None:
    """Of a subword: e to the mean negative log-probability. None where there is none, or it is beyond a float."""
    try:
        value = math.exp(-log_probability / tokens)
    except (OverflowError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def translator(
    model: Seq2SeqModel | TransformerModel | ConvS2SModel, source_words: int, target_words: int
) -> Translator:
    """The network that the keys of `model` describe, for vocabularies of these sizes."""
    options = model.model_dump(exclude={"kind"})
    match model:
        case Seq2SeqModel():
            return Seq2Seq(Seq2SeqOptions(**options), source_words, target_words, pad=PAD)
        case TransformerModel():
            return Transformer(source_words, target_words, pad=PAD, **options)
        case ConvS2SModel():
            return ConvS2S(source_words, target_words, pad=PAD, **options)


class Translation:
    """A translator with its data; `assets` are the vocabularies and the languages, all that using it needs."""

    unit = "target tokens"
    batch_key = "batch_tokens"
    """Of `training`: what bounds a batch."""

    def __init__(
        self,
        recipe: TranslationRecipe,
        assets: dict[str, Any] | None = None,
        *,
        runtime: Runtime,
        offline: bool = False,
        progress: Progress = silent,
        weights: Mapping[str, Tensor] | None = None,
        for_training: bool = True,
    ) -> None:
        if assets is not None:
            check_assets(assets, PairAssets)
        self.recipe = recipe
        self.runtime = runtime
        self.pairs = SentencePairs(
            recipe, assets, runtime=runtime, offline=offline, progress=progress, for_training=for_training
        )
        self.assets = self.pairs.assets
        self.notes = self.pairs.notes
        self._progress = progress
        words = len(self.pairs.source_vocabulary), len(self.pairs.target_vocabulary)
        model = built(lambda: translator(recipe.model, *words), recipe.training.seed, weights)
        self.model: Translator = model.to(runtime.device)

    @property
    def data_name(self) -> str:
        return self.recipe.data.source

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def splits(self) -> dict[str, int]:
        """Sentence pairs in each split."""
        return {name: len(pairs) for name, pairs in self.pairs.splits.items()}

    @property
    def digest(self) -> str:
        """Of what is trained and chosen on."""
        return self.pairs.digest

    @property
    def carved(self) -> bool:
        """Whether what is there for validation is a part of the training split; reads the data."""
        return self.pairs.carved

    def digest_of(self, split: str) -> str:
        """Of what is evaluated, where the data has that split."""
        return self.pairs.digest_of(split)

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, counted from 0."""
        return self.pairs.steps(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The training batches of an epoch from number `start` on, the same for the same seed and epoch."""
        return self.pairs.batches(epoch, start)

    def part(self, batch: PairBatch, index: int, parts: int) -> PairBatch:
        """One of `parts` parts of a batch, its pairs number `index`, `index + parts` and so on, padded anew.

        Pairs are dealt, so that parts are of like length. The sum of `loss` over the parts is that of
        the batch, but for what dropout draws. There must be as many pairs as parts.
        """
        return self.pairs.batch(batch.pairs[index::parts])

    def loss(self, batch: PairBatch) -> tuple[Tensor, int]:
        """Cross-entropy with label smoothing summed over the target subwords, eos included, and how many there are of
        them in the whole batch, of which this worker has a part.

        With a coverage weight, the coverage loss of See et al. 2017, eq. 12, is added: at each target subword the
        overlap of what attention looks at with all that it has looked at before. With R-Drop every pair is read twice
        at once, and dropout draws for each: the mean of both losses, and half of `r_drop` times the mean of both KL
        divergences between the two answers at each target subword (half the objective of Liang et al. 2021).
        """
        training = self.recipe.training
        if training.r_drop:
            batch = _twice(batch)
        with self.runtime.autocast():
            decoded, context = self.model(batch.source, batch.lengths, batch.previous)
            logits = self.model.logits(decoded, context, self._filled_up(batch.real))
        target = batch.target.flatten().index_select(0, batch.real)
        if training.r_drop:
            once = target[: len(target) // 2]
            total = agreeing_cross_entropy(logits, once, training.label_smoothing, training.r_drop)
        else:
            total = smoothed_cross_entropy(logits, target, training.label_smoothing)
        if training.coverage_weight:
            assert decoded.attention is not None
            covered = decoded.attention.cumsum(dim=1) - decoded.attention
            overlap = torch.minimum(decoded.attention, covered).sum(dim=2)
            overlap = overlap.flatten().index_select(0, batch.real).sum() / (2 if training.r_drop else 1)
            total = total + training.coverage_weight * overlap
        return total, batch.whole

    def _filled_up(self, real: Tensor) -> Tensor:
        """As `PairBatch.real`, where few shapes are wanted (see `fill`) followed by row 0 so often that there are a
        multiple of `ROWS_TOGETHER`: of these scores the loss takes no notice.
        """
        writes_code = self.runtime.device.type == "cpu" and self.runtime.precision != "fp32"
        few = writes_code and not self.recipe.training.r_drop  # whose loss wants both readings to be alike
        return functional.pad(real, (0, -len(real) % ROWS_TOGETHER)) if few else real

    def validate(self) -> Scores:
        """The score by which the best epoch is chosen, as `training.select` has it, and no more.

        Translations are greedy, as a beam would cost five times as much each epoch; scored without case where the model
        writes lower case alone. The `sample` among the details is the first of them, with its `source` and `reference`,
        so that one can watch a translation grow: `SAMPLE` characters of each. The loss is turned round, so that higher
        is better: `log_likelihood`, the mean log-probability of a target subword, eos included.
        """
        select = self.recipe.training.select
        if select == "loss":
            mean = self.log_likelihood("validation")
            if not math.isfinite(mean):
                raise UserError(
                    "the likelihood of the validation split is not a number",
                    hint="lower `--set optim.learning_rate=…` and train again",
                )
            return Scores("log_likelihood", {"log_likelihood": mean}, len(self.pairs.split("validation")))
        texts = self.translations("validation", self.recipe.decoding.updated(method="beam", beam=1))
        sources, references = zip(*self.pairs.split("validation"), strict=True)
        if select == "chrf":
            scores = chrf(texts, references, cased=self.cased)
        else:
            scores = bleu(texts, references, cased=self.cased, language=self.assets["target_language"])
        first = {"source": sources[0], "translation": texts[0], "reference": references[0]}
        return replace(scores, details={"sample": {name: text[:SAMPLE] for name, text in first.items()}})

    def evaluate(self, split: str, decoding: Decoding | None = None) -> Scores:
        """What `judge` says of a split's translations. Raises UserError where the data has no such split."""
        return self.judge(split, self.translations(split, decoding), likelihood=self.log_likelihood(split))

    def log_likelihood(self, split: str, *, others: Sequence["Translation"] = ()) -> float:
        """The mean log-probability of a subword of a split's targets, eos included; by an ensemble with `others`.

        Each pair is scored by one of the workers. Raises as `evaluate`.
        """
        pairs = self.pairs.split(split)
        own = self.score(pairs[self.runtime.workers.part(len(pairs))], others=others)
        scored = self._joined([(one.log_probability, len(one.tokens)) for one in own])
        mean: float = math.fsum(logarithm for logarithm, _ in scored) / sum(tokens for _, tokens in scored)
        return mean

    def translations(
        self, split: str, decoding: Decoding | None = None, *, others: Sequence["Translation"] = ()
    ) -> list[str]:
        """A split's sources translated, in their order, each by one of the workers; by an ensemble with `others`.

        Raises as `evaluate`.
        """
        sources = [source for source, _ in self.pairs.split(split)]
        part = self.runtime.workers.part(len(sources))
        lines = self.translate(sources[part], decoding, others=others, first_line=part.start + 1)
        return self._joined([line.text for line in lines])

    @property
    def cased(self) -> bool:
        """Whether the model tells upper case from lower; BLEU is without case where it does not."""
        return not self.recipe.data.lowercase

    def judge(
        self,
        split: str,
        translations: Sequence[str],
        *,
        others: Sequence["Translation"] = (),
        cased: bool | None = None,
        rouge: bool = False,
        likelihood: float | None = None,
    ) -> Scores:
        """BLEU of translations against a split's references, with the scores and details of `metrics.translation`, and
        how many sources were cut as too long and how many have what the vocabulary has not, for an ensemble with
        `others` where they are given; `cased` or not as the model is, unless it is given. Of the `likelihood` that
        `log_likelihood` gives, the details have the `perplexity` of a subword.
        """
        sources, references = zip(*self.pairs.split(split), strict=True)
        cased = self.cased if cased is None else cased
        scores = translation(
            sources,
            translations,
            references,
            cased=cased,
            language=self.assets["target_language"],
            source_language=self.assets["source_language"],
            with_rouge=rouge,
        )
        _, limit = self._ensemble(others)
        encoded = self.pairs.source_ids(sources)
        read = {
            "cut_sources": sum(len(ids) > limit for ids in encoded),
            "unknown_sources": sum(UNKNOWN in ids[:limit] for ids in encoded),
        }
        shown = {} if likelihood is None else {"perplexity": perplexity(likelihood, 1)}
        return replace(scores, details={**scores.details, **read, **shown})

    def translate(
        self,
        lines: Sequence[str],
        decoding: Decoding | None = None,
        *,
        n_best: int = 1,
        prefixes: Sequence[str] | None = None,
        others: Sequence["Translation"] = (),
        attention: bool = False,
        tree: list[Branch] | None = None,
        first_line: int = 1,
    ) -> list[TranslatedLine]:
        """Translate each line; a blank one stays blank. `decoding` is the recipe's where it is not given.

        By the method `sample` the n best are n samples in the order drawn; they depend on `decoding.seed` and on the
        number of the line, counted from `first_line`. `prefixes` are texts that the translations begin with, `others`
        the rest of an ensemble. `attention`: whether candidates have theirs. `tree`, where at most one line is not
        blank, is given what a beam has considered for it. Lines of like length are searched together, which in float32
        changes a result where two tie within rounding, and else only the time. Raises UserError where `n_best` is more
        than the beam, where a prefix has what the vocabulary has not, and ValueError where models of an ensemble do not
        agree, or a tree is wanted of several lines.
        """
        decoding = self.recipe.decoding if decoding is None else decoding
        if decoding.method == "beam" and n_best > decoding.beam:
            raise UserError(f"a beam of {decoding.beam} cannot give the {n_best} best", hint=f"add `--beam {n_best}`")
        models, limit = self._ensemble(others)
        encoded = self.pairs.source_ids(lines)
        prefixes = prefixes or [""] * len(lines)
        begun = self.pairs.target_ids(prefixes)
        for text, ids in zip(prefixes, begun, strict=True):
            if UNKNOWN in ids:
                raise UserError(
                    f"`{text}` has characters or words that the model cannot write",
                    hint="begin translations with what the training data has",
                )
        answers = [TranslatedLine("", 0.0, [], [], None, False)] * len(lines)
        lengths = np.array([len(self.pairs.read(ids[:limit])) if ids else 0 for ids in encoded], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :]
        room = -(-lengths // _SHORT) * (decoding.beam if decoding.method == "beam" else n_best)
        done = 0
        if tree is not None and len(order) > 1:
            raise ValueError(f"a tree is of one sentence, not of {len(order)}")
        steps: list[list[Extension]] = []

        def searched(chosen: np.ndarray, check: Callable[[], None]) -> list[list[Hypothesis]]:
            sentences = [encoded[at][:limit] for at in chosen]
            with self.runtime.autocast_search():
                return search(
                    models,
                    *self.pairs.sources(sentences),
                    decoding,
                    subwords=[len(ids) for ids in sentences],
                    prefixes=[begun[at] for at in chosen],
                    numbers=[first_line + int(at) for at in chosen],
                    n_best=n_best,
                    attention=attention,
                    tree=None if tree is None else steps,
                    check=check,
                )

        with evaluation_mode(*models):  # here too: a thread that ends must not take the others out of it
            batches = fill(order, room, HYPOTHESES_AT_ONCE)[::-1]  # the longest first: no thread is to end with them
            for chosen, found in each_alone(searched, batches, self.runtime.device):
                for at, hypotheses in zip(chosen, found, strict=True):
                    ids = encoded[at][:limit]
                    tokens = self.pairs.source_tokens(ids)
                    candidates = [self._candidate(one, len(tokens)) for one in hypotheses]
                    text, score = (candidates[0].text, candidates[0].score) if candidates else ("", -math.inf)
                    cut = limit if len(encoded[at]) > limit else None
                    answers[at] = TranslatedLine(text, score, tokens, candidates, cut, UNKNOWN in ids)
                done += len(chosen)
                self._progress("translating", done, len(order))
        if tree is not None:
            tree.extend(self._branches(steps))
        return answers

    def score(self, pairs: Sequence[tuple[str, str]], *, others: Sequence["Translation"] = ()) -> list[ScoredPair]:
        """What the model, or an ensemble with `others`, says of each pair's target given its source.

        By teacher forcing. A source too long is cut as `translate` cuts it. Raises ValueError as `translate` does.
        """
        models, limit = self._ensemble(others)
        encoded = self.pairs.source_ids([source for source, _ in pairs])
        sources = [ids[:limit] for ids in encoded]
        targets = self.pairs.target_ids([target for _, target in pairs])
        answers = [ScoredPair(0.0, [], [], None, False)] * len(pairs)
        read = [len(self.pairs.read(ids)) for ids in sources]
        lengths = even(np.array([max(length, len(ids) + 1) for length, ids in zip(read, targets, strict=True)]))
        for chosen in fill(np.argsort(lengths, kind="stable"), lengths, SUBWORDS_AT_ONCE):
            batch = self.pairs.batch([(sources[at], targets[at]) for at in chosen])
            with self.runtime.autocast_search():
                values = teacher_forced(models, *batch[:5]).tolist()
            for at in chosen:
                tokens = self.pairs.target_vocabulary.pieces([*targets[at], EOS])
                own, values = values[: len(tokens)], values[len(tokens) :]
                cut = limit if len(encoded[at]) > limit else None
                unknown = UNKNOWN in sources[at] or UNKNOWN in targets[at]
                answers[at] = ScoredPair(math.fsum(own), tokens, own, cut, unknown)
        return answers

    def _joined(self, own: list[Any]) -> list[Any]:
        """The lists of all workers as one."""
        return [one for part in self.runtime.workers.gathered(own) for one in part]

    def _ensemble(self, others: Sequence["Translation"]) -> tuple[list[Translator], int]:
        """The models that answer together, and the most subwords that all of them read."""
        if not all(self.pairs.agrees_with(other.pairs) for other in others):
            raise ValueError("the models of an ensemble must read and write the same")
        tasks = [self, *others]
        return [one.model for one in tasks], min(one.recipe.data.max_length for one in tasks)

    def _branches(self, steps: Sequence[Sequence[Extension]]) -> list[Branch]:
        """The hypotheses of a search step by step, those of a step best first."""
        branches: list[Branch] = []
        alive: dict[int, int | None] = {0: None}
        for number, step in enumerate(steps, start=1):
            begin = len(branches)
            tokens = self.pairs.target_vocabulary.pieces([one.id for one in step])
            branches.extend(
                Branch(alive[one.parent], number, token, one.log_probability, one.score, one.place is not None)
                for one, token in zip(step, tokens, strict=True)
            )
            alive = {one.place: at for at, one in enumerate(step, start=begin) if one.place is not None}
        return branches

    def _candidate(self, found: Hypothesis, source_length: int) -> Candidate:
        return Candidate(
            self.pairs.target_vocabulary.decode(found.ids),
            found.score,
            found.log_probability,
            self.pairs.target_vocabulary.pieces([*found.ids, EOS]),
            list(found.token_log_probabilities),
            None if found.attention is None else found.attention[:, :source_length],
        )


def refuse_disagreement(names: Sequence[str], members: Sequence[Translation]) -> None:
    """Raise UserError where translators that go by these names cannot answer as one."""
    for name, other in zip(names[1:], members[1:], strict=True):
        if not members[0].pairs.agrees_with(other.pairs):
            raise UserError(
                f"`{names[0]}` and `{name}` differ in vocabulary, languages or reading order",
                hint="train the runs of an ensemble on the same data with the same keys of `data`",
            )


def _twice(batch: PairBatch) -> PairBatch:
    """Every pair of a batch, and after the last all of them again."""
    source, previous, target = (one.repeat(2, 1) for one in (batch.source, batch.previous, batch.target))
    real = torch.cat([batch.real, batch.real + batch.target.numel()])
    return batch._replace(source=source, lengths=batch.lengths.repeat(2), previous=previous, target=target, real=real)
