"""Translation: where a recipe meets sentence pairs, a vocabulary, a sequence-to-sequence model, search and BLEU."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dl7cli.data.pairs import Pairs, read_pairs
from dl7cli.data.sources import Progress, silent
from dl7cli.data.transfer import moved
from dl7cli.data.vocabulary import BOS, EOS, PAD, Subwords, Vocabulary
from dl7cli.device import Runtime, seed_everything
from dl7cli.errors import UserError
from dl7cli.metrics import Scores, bleu, chrf, translation
from dl7cli.models.convolutional import ConvS2S
from dl7cli.models.cross_entropy import smoothed_cross_entropy
from dl7cli.models.seq2seq import Seq2Seq, Seq2SeqOptions
from dl7cli.models.transformer import Transformer
from dl7cli.models.translator import Translator
from dl7cli.recipe import ConvS2SModel, Decoding, Seq2SeqModel, TransformerModel, TranslationRecipe
from dl7cli.search import Hypothesis
from dl7cli.tasks.decoding import search, teacher_forced

HYPOTHESES_AT_ONCE = 640
"""Sentences searched at once times the beam."""
SUBWORDS_AT_ONCE = 8192
"""Most subwords of a batch that is scored, padding included."""


class PairBatch(NamedTuple):
    """B sentence pairs of at most S source and T target subwords, padded with PAD."""

    source: Tensor
    """(B, S)"""
    lengths: Tensor
    """(B,) ids of each source sentence as the model reads it, eos included"""
    previous: Tensor
    """(B, T) target subwords from bos on: what the decoder reads"""
    target: Tensor
    """(B, T) target subwords up to eos: what it should answer"""
    real: Tensor
    """(N,) where `target`, flattened, is not padding"""


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
    source_tokens: list[str]
    """As the model reads them, `</s>` included; none of a blank line."""
    alternatives: list[Candidate]
    """The n best, the first included; none for a blank line."""
    cut: bool
    """Whether the line was longer than the model's limit."""


class ScoredPair(NamedTuple):
    """What the model says of a given translation."""

    log_probability: float
    tokens: list[str]
    """Target subwords, `</s>` included."""
    token_log_probabilities: list[float]

    @property
    def perplexity(self) -> float:
        """Of a subword."""
        return perplexity([self])


def perplexity(scored: Sequence[ScoredPair]) -> float:
    """Of a subword of all these translations together: e to the mean negative log-probability."""
    total = sum(one.log_probability for one in scored)
    return math.exp(-total / sum(len(one.tokens) for one in scored))


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

    def __init__(
        self,
        recipe: TranslationRecipe,
        assets: dict[str, Any] | None = None,
        *,
        runtime: Runtime,
        offline: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.recipe = recipe
        self.runtime = runtime
        self.notes: list[str] = []
        self._offline = offline
        self._progress = progress
        self._pairs: dict[str, list[tuple[str, str]]] | None = None
        self._encoded: list[tuple[list[int], list[int]]] | None = None
        self._texts: list[tuple[str, str]] = []
        self._plan: tuple[int, list[np.ndarray]] | None = None
        self._steps: dict[int, int] = {}
        if assets is None:
            assets = {
                **self._learn_vocabularies(),
                "source_language": recipe.data.source_language,
                "target_language": recipe.data.target_language,
            }
        self.assets = assets
        self.source_vocabulary = self.target_vocabulary = Vocabulary.from_json(assets["vocabulary"])
        if "target_vocabulary" in assets:
            self.target_vocabulary = Vocabulary.from_json(assets["target_vocabulary"])
        seed_everything(recipe.training.seed)
        words = len(self.source_vocabulary), len(self.target_vocabulary)
        self.model: Translator = translator(recipe.model, *words).to(runtime.device)

    @property
    def data_name(self) -> str:
        return self.recipe.data.source

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def splits(self) -> dict[str, int]:
        """Sentence pairs in each split."""
        return {name: len(pairs) for name, pairs in self._splits().items()}

    @cached_property
    def digest(self) -> str:
        """Of what is trained and chosen on: the sentences of the training and validation splits."""
        digest = hashlib.sha256()
        for split in ("train", "validation"):
            for pair in self._splits()[split]:
                digest.update("\t".join((*pair, "\n")).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, counted from 0."""
        if epoch not in self._steps:
            self._steps[epoch] = len(self._batch_plan(epoch))
        return self._steps[epoch]

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The training batches of an epoch from number `start` on, the same for the same seed and epoch."""
        pairs = self._training_pairs()
        sampled = self.recipe.data.subword_sampling > 0
        for number, chosen in enumerate(self._batch_plan(epoch)[start:], start):
            yield self._batch(self._sampled(chosen, epoch, number) if sampled else [pairs[index] for index in chosen])

    def loss(self, batch: PairBatch) -> tuple[Tensor, int]:
        """Cross-entropy with label smoothing summed over the target subwords, eos included, and how many they are.

        With a coverage weight, the coverage loss of See et al. 2017, eq. 12, is added: at each target subword the
        overlap of what attention looks at with all that it has looked at before.
        """
        with self.runtime.autocast():
            decoded, context = self.model(batch.source, batch.lengths, batch.previous)
            logits = self.model.logits(decoded, context, batch.real)
        target = batch.target.flatten().index_select(0, batch.real)
        smoothing = self.recipe.training.label_smoothing
        total = smoothed_cross_entropy(logits, target, smoothing)
        if self.recipe.training.coverage_weight:
            assert decoded.attention is not None
            covered = decoded.attention.cumsum(dim=1) - decoded.attention
            overlap = torch.minimum(decoded.attention, covered).sum(dim=2)
            total = total + self.recipe.training.coverage_weight * overlap.flatten().index_select(0, batch.real).sum()
        return total, len(target)

    def validate(self) -> Scores:
        """The score by which the best epoch is chosen, as `training.select` has it, and no more.

        Translations are greedy, as a beam would cost five times as much each epoch. The loss is turned round, so that
        higher is better: `log_likelihood`, the mean log-probability of a target subword, eos included.
        """
        select = self.recipe.training.select
        if select == "loss":
            scored = self.score(self._pairs_of("validation"))
            mean = math.fsum(one.log_probability for one in scored) / sum(len(one.tokens) for one in scored)
            if not math.isfinite(mean):
                raise UserError(
                    "the likelihood of the validation split is not a number",
                    hint="lower `--set optim.learning_rate=…` and train again",
                )
            return Scores("log_likelihood", {"log_likelihood": mean}, len(scored))
        texts = self.translations("validation", self.recipe.decoding.updated(method="beam", beam=1))
        references = [target for _, target in self._pairs_of("validation")]
        return bleu(texts, references) if select == "bleu" else chrf(texts, references)

    def evaluate(self, split: str, decoding: Decoding | None = None) -> Scores:
        """What `judge` says of a split's translations. Raises UserError where the data has no such split."""
        return self.judge(split, self.translations(split, decoding))

    def translations(self, split: str, decoding: Decoding | None = None) -> list[str]:
        """A split's sources translated, in their order. Raises as `evaluate`."""
        return [line.text for line in self.translate([source for source, _ in self._pairs_of(split)], decoding)]

    def judge(self, split: str, translations: Sequence[str], *, rouge: bool = False) -> Scores:
        """BLEU of translations against a split's references, with the scores and details of `metrics.translation`."""
        sources, references = zip(*self._pairs_of(split), strict=True)
        return translation(sources, translations, references, with_rouge=rouge)

    def translate(
        self,
        lines: Sequence[str],
        decoding: Decoding | None = None,
        *,
        n_best: int = 1,
        prefixes: Sequence[str] | None = None,
        others: Sequence["Translation"] = (),
        attention: bool = False,
        first_line: int = 1,
    ) -> list[TranslatedLine]:
        """Translate each line; a blank one stays blank. `decoding` is the recipe's where it is not given.

        By the method `sample` the n best are n samples in the order drawn; they depend on `decoding.seed` and on the
        number of the line, counted from `first_line`. `prefixes` are texts that the translations begin with, `others`
        the rest of an ensemble. `attention`: whether candidates have theirs. Lines of like length are searched
        together, which changes no result, only the time. Raises UserError where `n_best` is more than the beam, and
        where the models of an ensemble do not read and write the same.
        """
        decoding = self.recipe.decoding if decoding is None else decoding
        if decoding.method == "beam" and n_best > decoding.beam:
            raise UserError(
                f"a beam of {decoding.beam} cannot give the {n_best} best", hint=f"use `--beam {n_best}` or more"
            )
        models, limit = self._ensemble(others)
        encoded = self._ids(self.source_vocabulary, lines)
        begun = self._ids(self.target_vocabulary, prefixes or [""] * len(lines))
        answers = [TranslatedLine("", 0.0, [], [], False)] * len(lines)
        order = sorted((at for at, ids in enumerate(encoded) if ids), key=lambda at: len(encoded[at]))
        size = max(1, HYPOTHESES_AT_ONCE // (decoding.beam if decoding.method == "beam" else n_best))
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            sentences = [encoded[at][:limit] for at in chosen]
            found = search(
                models,
                *self._padded([self._source(ids) for ids in sentences]),
                decoding,
                subwords=[len(ids) for ids in sentences],
                prefixes=[begun[at] for at in chosen],
                numbers=[first_line + at for at in chosen],
                n_best=n_best,
                attention=attention,
            )
            for at, ids, hypotheses in zip(chosen, sentences, found, strict=True):
                tokens = self.source_tokens(ids)
                candidates = [self._candidate(one, len(tokens)) for one in hypotheses]
                text, score = (candidates[0].text, candidates[0].score) if candidates else ("", 0.0)
                answers[at] = TranslatedLine(text, score, tokens, candidates, len(encoded[at]) > limit)
            self._progress("translating", begin + len(chosen), len(order))
        return answers

    def score(self, pairs: Sequence[tuple[str, str]], *, others: Sequence["Translation"] = ()) -> list[ScoredPair]:
        """What the model, or an ensemble with `others`, says of each pair's target given its source.

        By teacher forcing. A source too long is cut as `translate` cuts it. Raises UserError as `translate` does for an
        ensemble.
        """
        models, limit = self._ensemble(others)
        sources = self._ids(self.source_vocabulary, [source for source, _ in pairs])
        targets = self._ids(self.target_vocabulary, [target for _, target in pairs])
        answers = [ScoredPair(0.0, [], [])] * len(pairs)
        lengths = np.array([max(len(s), len(t)) + 1 for s, t in zip(sources, targets, strict=True)])
        for chosen in _fill(np.argsort(lengths, kind="stable"), lengths, SUBWORDS_AT_ONCE) if pairs else []:
            batch = self._batch([(sources[at][:limit], targets[at]) for at in chosen])
            values = teacher_forced(models, *batch).tolist()
            for at in chosen:
                length = len(targets[at]) + 1
                own, values = values[:length], values[length:]
                answers[at] = ScoredPair(math.fsum(own), self.target_vocabulary.pieces([*targets[at], EOS]), own)
        return answers

    def _ensemble(self, others: Sequence["Translation"]) -> tuple[list[Translator], int]:
        """The models that answer together, and the most subwords that all of them read."""
        own = self.recipe.data
        for other in others:
            data = other.recipe.data
            read_alike = (data.source_order, data.lowercase) == (own.source_order, own.lowercase)
            if other.assets != self.assets or not read_alike:
                raise UserError(
                    f"`{self.recipe.name}` and `{other.recipe.name}` differ in vocabulary, languages or reading order",
                    hint="train the runs of an ensemble on the same data with the same keys of `data`",
                )
        tasks = [self, *others]
        return [one.model for one in tasks], min(one.recipe.data.max_length for one in tasks)

    def _candidate(self, found: Hypothesis, source_length: int) -> Candidate:
        return Candidate(
            self.target_vocabulary.decode(found.ids),
            found.score,
            found.log_probability,
            self.target_vocabulary.pieces([*found.ids, EOS]),
            list(found.token_log_probabilities),
            None if found.attention is None else found.attention[:, :source_length],
        )

    def _splits(self) -> dict[str, list[tuple[str, str]]]:
        if self._pairs is None:
            self._pairs = self._read()
        return self._pairs

    def _pairs_of(self, split: str) -> list[tuple[str, str]]:
        if split not in self._splits():
            raise UserError(f"`{self.data_name}` has no split `{split}`", hint=f"it has {', '.join(self._splits())}")
        return self._splits()[split]

    def _read(self) -> dict[str, list[tuple[str, str]]]:
        data = self.recipe.data
        found: Pairs = read_pairs(
            data.source,
            source_language=data.source_language,
            target_language=data.target_language,
            offline=self._offline,
            progress=self._progress,
        )
        self.notes.extend(found.notes)
        splits = dict(found.splits)
        if "validation" not in splits:
            splits["train"], splits["validation"] = _carve(splits["train"], data.validation_fraction)
            self.notes.append(f"{len(splits['validation']):,} pairs of train are kept for validation")
        return splits

    def _learn_vocabularies(self) -> dict[str, Any]:
        """The assets `vocabulary`, of the source or of both languages, and `target_vocabulary` where they have two."""
        data, train = self.recipe.data, self._splits()["train"]
        texts = {"vocabulary": [text for pair in train for text in pair]}
        if not data.joint:
            texts = {
                "vocabulary": [source for source, _ in train],
                "target_vocabulary": [target for _, target in train],
            }
        learnt = {}
        for number, (name, lines) in enumerate(texts.items()):
            self._progress("learning the vocabulary", number, len(texts))
            lines = [self._text(line) for line in lines]
            learnt[name] = Vocabulary.train(lines, data.vocabulary_size, data.vocabulary).to_json()
        self._progress("learning the vocabulary", len(texts), len(texts))
        return learnt

    def _training_pairs(self) -> list[tuple[list[int], list[int]]]:
        """Training pairs as subword ids, without those longer than the recipe's limit."""
        if self._encoded is None:
            pairs = self._splits()["train"]
            limit = self.recipe.data.max_length
            sources = self._ids(self.source_vocabulary, [source for source, _ in pairs])
            targets = self._ids(self.target_vocabulary, [target for _, target in pairs])
            both = list(zip(sources, targets, strict=True))
            within = [at for at, (source, target) in enumerate(both) if max(len(source), len(target)) <= limit]
            self._encoded = [both[at] for at in within]
            self._texts = [pairs[at] for at in within]
            if not self._encoded:
                raise UserError(
                    f"no training pair of `{self.data_name}` is within {limit} subwords",
                    hint="raise `--set data.max_length=N`",
                )
            if len(self._encoded) < len(pairs):
                left_out = len(pairs) - len(self._encoded)
                self.notes.append(f"{left_out:,} training pairs longer than {limit} subwords are left out")
        return self._encoded

    def _batch_plan(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each batch: of like length, at most `batch_tokens` padded steps a side, in random order.

        Lengths are those without sampling, so that the number of steps is known before anything is drawn.
        """
        if self._plan is None or self._plan[0] != epoch:
            pairs = self._training_pairs()
            random = np.random.default_rng([self.recipe.training.seed, epoch])
            targets = np.array([len(target) + 1 for _, target in pairs])
            sources = np.array([len(self._source(source)) for source, _ in pairs])
            # The noise lets pairs meet other partners in every epoch.
            noise = random.integers(0, 2, len(pairs))
            order = np.lexsort((sources + random.random(len(pairs)), targets + noise))
            batches = _fill(order, np.maximum(sources, targets), self.recipe.training.batch_tokens)
            self._plan = epoch, [batches[index] for index in random.permutation(len(batches))]
        return self._plan[1]

    def _sampled(self, chosen: np.ndarray, epoch: int, number: int) -> list[tuple[list[int], list[int]]]:
        """Pairs in subwords drawn anew: a function of the seed, the epoch and the batch's number in it.

        A sentence that gets longer than the recipe's limit is taken as it is without sampling.
        """
        limit, pairs = self.recipe.data.max_length, self._training_pairs()
        random = Random(f"{self.recipe.training.seed} {epoch} {number}")

        def drawn(at: int, side: int) -> list[int]:
            ids = self._samplers[side](self._text(self._texts[at][side]), random)
            return ids if len(ids) <= limit else pairs[at][side]

        return [(drawn(at, 0), drawn(at, 1)) for at in chosen]

    @cached_property
    def _samplers(self) -> list[Callable[[str, Random], list[int]]]:
        """What draws the subwords of a source and of a target."""
        data = self.recipe.data
        samplers = []
        for vocabulary in (self.source_vocabulary, self.target_vocabulary):
            assert isinstance(vocabulary, Subwords)
            samplers.append(vocabulary.sampler(data.vocabulary, data.subword_sampling))
        return samplers

    def source_tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of a sentence in the order in which the model reads them, `</s>` included."""
        return self.source_vocabulary.pieces(self._source(ids))

    def _source(self, ids: Sequence[int]) -> list[int]:
        """A sentence as the model reads it, in training, search and scoring alike."""
        match self.recipe.data.source_order:
            case "forward":
                return [*ids, EOS]
            case "reversed":
                return [*reversed(ids), EOS]
            case "doubled":
                return [*ids, *ids, EOS]

    def _ids(self, vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
        return vocabulary.encode_all([self._text(text) for text in texts])

    def _text(self, text: str) -> str:
        """A sentence as the model's vocabularies know it."""
        return text.strip().lower() if self.recipe.data.lowercase else text.strip()

    def _batch(self, pairs: list[tuple[list[int], list[int]]]) -> PairBatch:
        source, lengths = self._padded([self._source(ids) for ids, _ in pairs])
        previous, _ = self._padded([[BOS, *ids] for _, ids in pairs])
        target = _rectangle([[*ids, EOS] for _, ids in pairs])
        # Found before it is moved: a device would have to be waited for.
        real = (target != PAD).flatten().nonzero().flatten()
        device = self.runtime.device
        return PairBatch(source, lengths, previous, moved(target, device), moved(real, device))

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids as one tensor (B, longest), and their lengths (B,), on the device."""
        device = self.runtime.device
        return moved(_rectangle(rows), device), moved(torch.tensor([len(row) for row in rows]), device)


def _rectangle(rows: list[list[int]]) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def _fill(order: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut `order` into runs whose longest member times their number is at most `tokens`; at least one each."""
    batches = []
    begin, longest = 0, 0
    for at, index in enumerate(order):
        grown = max(longest, int(lengths[index]))
        if at > begin and grown * (at + 1 - begin) > tokens:
            batches.append(order[begin:at])
            begin, grown = at, int(lengths[index])
        longest = grown
    return [*batches, order[begin:]]


def _carve(pairs: list[tuple[str, str]], fraction: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split training pairs into two; the choice is the same for every seed, so that runs can be compared."""
    kept = max(1, round(len(pairs) * fraction))
    if kept >= len(pairs):
        raise UserError(f"{len(pairs)} training pairs are too few to keep some for validation", hint="add pairs")
    chosen = set(np.random.default_rng(0).permutation(len(pairs))[:kept].tolist())
    rest = [pair for at, pair in enumerate(pairs) if at not in chosen]
    return rest, [pair for at, pair in enumerate(pairs) if at in chosen]
