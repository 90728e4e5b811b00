"""The sentence pairs of a recipe as its model reads them: vocabularies, subwords, reading order and batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dl7cli.data.dividing import kept_back, part_of
from dl7cli.data.pairs import digest, read_pairs
from dl7cli.data.sources import Progress, is_file
from dl7cli.data.transfer import moved
from dl7cli.data.vocabulary import BOS, EOS, PAD, Subwords, Vocabulary
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.files import on_one_line
from dl7cli.recipe import TranslationRecipe

Sampler = Callable[[str, Random], list[int]]

PAIRS_BETWEEN_NOTES = 1000
"""Of which the subwords are drawn before progress is told again."""


class PairBatch(NamedTuple):
    """B sentence pairs of at most S source and T target subwords, padded with PAD to an even number each."""

    source: Tensor
    """(B, S)"""
    lengths: Tensor
    """(B,) ids of each source sentence as the model reads it, eos included"""
    previous: Tensor
    """(B, T) target subwords from bos on: what the decoder reads"""
    target: Tensor
    """(B, T) target subwords up to eos: what it should answer"""
    real: Tensor
    """(N,) where `target`, flattened, is not padding: what counts"""
    pairs: Sequence[tuple[list[int], list[int]]]
    """What all this was made of, so that parts can be made of it without asking the device."""
    whole: int
    """Target subwords of the whole batch, of which other workers may have the rest"""


class TrainingPairs(NamedTuple):
    """The training pairs that are within the recipe's limit."""

    texts: list[tuple[str, str]]
    ids: list[tuple[list[int], list[int]]]
    """In subwords that are not sampled."""
    lengths: tuple[np.ndarray, np.ndarray]
    """(pairs,) of each source as the model reads it and of each target, eos included."""


class SentencePairs:
    """The data of a translation recipe. `assets` are the vocabularies and the languages.

    Without `assets` the vocabularies are learnt from the training split; with them, no data is read until it is asked
    for. Batches are on the runtime's device; `notes` tell what was left out or carved off.
    """

    def __init__(
        self,
        recipe: TranslationRecipe,
        assets: dict[str, Any] | None,
        *,
        runtime: Runtime,
        offline: bool,
        progress: Progress,
        for_training: bool = True,
    ) -> None:
        self.notes: list[str] = []
        self._carved = False
        self._whole: list[tuple[str, str]] | None = None
        """The training split, where a part of it is used."""
        self._data = recipe.data
        self._seed = recipe.training.seed
        self._batch_tokens = recipe.training.batch_tokens
        self._device, self._workers = runtime.device, runtime.workers
        self._offline = offline
        self._progress = progress
        self._for_training = for_training
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

    @property
    def carved(self) -> bool:
        """Whether what is there for validation is a part of the training split."""
        return "train" in self.splits and self._carved  # the first half reads the data

    @cached_property
    def splits(self) -> dict[str, list[tuple[str, str]]]:
        """Source and target sentences of each split; for training `train` and `validation` are there in any case.

        To be evaluated, a single file is also the test split as a whole.
        """
        data = self._data
        found = read_pairs(
            data.source,
            source_language=data.source_language,
            target_language=data.target_language,
            offline=self._offline,
            progress=self._progress,
            for_training=self._for_training,
        )
        self.notes.extend(found.notes)
        splits = dict(found.splits)
        whole = splits.get("train", [])
        self._carved = "validation" not in splits and (self._for_training or len(whole) > 1)
        if self._carved:
            parts = kept_back(len(whole), data.validation_fraction, "pairs")
            splits["train"], splits["validation"] = ([whole[at] for at in part] for part in parts)
            self.notes.append(f"kept for validation: {len(splits['validation']):,} of {len(whole):,} pairs of train")
        if data.train_examples is not None and self._for_training:
            self._whole = train = splits["train"]
            splits["train"] = [train[at] for at in part_of(len(train), data.train_examples)]
            self.notes.append(f"trained on: {len(splits['train']):,} of {len(train):,} pairs of train")
        if self._carved and self._for_training:
            met = {source for source, _ in splits["train"]}
            if known := sum(source in met for source, _ in splits["validation"]):
                self.notes.append(f"{known:,} of those kept have a source that is trained on, too: they score too well")
        if not self._for_training and is_file(data.source):
            splits["test"] = whole
            self.notes.append(f"the test split is all of {data.source}")
        return splits

    def split(self, name: str) -> list[tuple[str, str]]:
        """Source and target sentences of one split. Raises UserError where the data has no such split."""
        if name not in self.splits:
            raise UserError(f"`{self._data.source}` has no split `{name}`", hint=f"it has {', '.join(self.splits)}")
        return self.splits[name]

    @cached_property
    def digest(self) -> str:
        """Of what there is to train and choose on, of which a part may be used: the sentences of both splits."""
        splits = dict(self.splits)
        if self._whole is not None:
            splits["train"] = self._whole
        return digest(*(splits.get(split, ()) for split in ("train", "validation")))

    def digest_of(self, *splits: str) -> str:
        """Of the sentences of some splits, as far as there are such."""
        return digest(*(self.splits.get(split, ()) for split in splits))

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, counted from 0."""
        if epoch not in self._steps:
            self._steps[epoch] = len(self._batch_plan(epoch))
        return self._steps[epoch]

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The training batches of an epoch from number `start` on, the same for the same seed and epoch.

        Of each, every worker gets pairs that are as much work as another's.
        """
        pairs, drawn = self._training_pairs.ids, None
        if self._data.subword_sampling > 0:
            pairs = self._sampled(epoch)
            drawn = self._lengths(pairs)
        for plan in self._batch_plan(epoch, drawn)[start:]:
            chosen = [pairs[index] for index in plan]
            whole = sum(len(target) + 1 for _, target in chosen)
            own = self._workers.dealt(chosen)
            if own:
                yield self.batch(own)._replace(whole=whole)
            else:
                # Fewer pairs than workers: the gradient, which all wait for, is that of a pair of which nothing counts.
                batch = self.batch(chosen[:1])
                yield batch._replace(real=batch.real[:0], whole=whole)

    def batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> PairBatch:
        """Pairs of ids, without bos and eos and in their own order, as a batch on the device."""
        source, lengths = self.sources([ids for ids, _ in pairs])
        previous = moved(_rectangle([[BOS, *ids] for _, ids in pairs]), self._device)
        target = _rectangle([[*ids, EOS] for _, ids in pairs])
        # Found before it is moved: a device would have to be waited for.
        real = (target != PAD).flatten().nonzero().flatten()
        target, real = moved(target, self._device), moved(real, self._device)
        return PairBatch(source, lengths, previous, target, real, pairs, len(real))

    def sources(self, sentences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """The `source` (B, S) and the `lengths` (B,) of a batch, of sentences as for `batch`."""
        rows = [self.read(ids) for ids in sentences]
        lengths = torch.tensor([len(row) for row in rows])
        return moved(_rectangle(rows), self._device), moved(lengths, self._device)

    def source_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of source sentences, without eos and in their own order."""
        return self.source_vocabulary.encode_all([self._source(text) for text in texts])

    def target_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of target sentences, without bos and eos."""
        return self.target_vocabulary.encode_all([self._target(text) for text in texts])

    def read(self, ids: Sequence[int]) -> list[int]:
        """A source as the model reads it, in training, search and scoring alike."""
        match self._data.source_order:
            case "forward":
                return [*ids, EOS]
            case "reversed":
                return [*reversed(ids), EOS]
            case "doubled":
                return [*ids, *ids, EOS]

    def source_tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of a sentence in the order in which the model reads them, `</s>` included."""
        return self.source_vocabulary.pieces(self.read(ids))

    def agrees_with(self, other: "SentencePairs") -> bool:
        """Whether both have the same vocabularies and languages, and their models read a text alike."""
        one, two = self._data, other._data
        read_alike = (one.source_order, one.lowercase) == (two.source_order, two.lowercase)
        words = ("vocabulary", "target_vocabulary", "source_language", "target_language")
        return read_alike and all(self.assets.get(name) == other.assets.get(name) for name in words)

    def _learn_vocabularies(self) -> dict[str, Any]:
        """The assets `vocabulary`, of the source or of both languages, and `target_vocabulary` where they have two."""
        data = self._data
        train = [(self._source(source), self._target(target)) for source, target in self.splits["train"]]
        texts = {"vocabulary": [text for pair in train for text in pair]}
        if not data.joint:
            texts = {
                "vocabulary": [source for source, _ in train],
                "target_vocabulary": [target for _, target in train],
            }
        learnt = {}
        for number, (name, lines) in enumerate(texts.items()):
            self._progress("learning the vocabulary", number, len(texts))
            learnt[name] = Vocabulary.train(lines, data.vocabulary_size, data.vocabulary).to_json()
        self._progress("learning the vocabulary", len(texts), len(texts))
        return learnt

    @cached_property
    def _training_pairs(self) -> TrainingPairs:
        pairs = self.splits["train"]
        limit = self._data.max_length
        sources = self.source_ids([source for source, _ in pairs])
        targets = self.target_ids([target for _, target in pairs])
        both = list(zip(sources, targets, strict=True))
        within = [at for at, (source, target) in enumerate(both) if max(len(source), len(target)) <= limit]
        if not within:
            raise UserError(
                f"no training pair of `{self._data.source}` is within {limit} subwords",
                hint="raise `--set data.max_length=N`",
            )
        if len(within) < len(pairs):
            left = f"{len(pairs) - len(within):,} of {len(pairs):,} training pairs"
            self.notes.append(f"left out: {left}, longer than {limit} subwords")
        ids = [both[at] for at in within]
        return TrainingPairs([pairs[at] for at in within], ids, self._lengths(ids))

    def _lengths(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """As `TrainingPairs.lengths`."""
        sources = np.array([len(self.read(source)) for source, _ in pairs])
        return sources, np.array([len(target) + 1 for _, target in pairs])

    def _batch_plan(self, epoch: int, drawn: tuple[np.ndarray, np.ndarray] | None = None) -> list[np.ndarray]:
        """The pairs of each batch: of like length, at most `batch_tokens` padded steps a side, in random order.

        With sampling their lengths are `drawn`. The batches are then of as many pairs as without, so that their number
        is known before anything is drawn, but of pairs that are of like length as drawn.
        """
        random = np.random.default_rng([self._seed, epoch])
        usual = self._training_pairs.lengths
        # Lets pairs meet other partners in every epoch.
        noise = 2 * random.random(len(usual[1]))

        def by_length(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return np.lexsort((sources + noise, even(targets)))

        batches = fill(by_length(*usual), even(np.maximum(*usual)), self._batch_tokens, few_sizes=True)
        if drawn is not None:
            batches = np.split(by_length(*drawn), np.cumsum([len(batch) for batch in batches])[:-1])
        return [batches[index] for index in random.permutation(len(batches))]

    def _sampled(self, epoch: int) -> list[tuple[list[int], list[int]]]:
        """All training pairs in subwords drawn anew: a function of the seed and the epoch.

        A sentence that gets longer than the recipe's limit is taken as it is without sampling.
        """
        limit, (texts, usual, _) = self._data.max_length, self._training_pairs
        random = Random(f"{self._seed} {epoch}")

        def drawn(at: int, side: int) -> list[int]:
            text = (self._source, self._target)[side](texts[at][side])
            ids = self._samplers[side](text, random)
            return ids if len(ids) <= limit else usual[at][side]

        pairs = []
        for at in range(len(texts)):
            if at % PAIRS_BETWEEN_NOTES == 0:
                self._progress("drawing subwords", at, len(texts))
            pairs.append((drawn(at, 0), drawn(at, 1)))
        self._progress("drawing subwords", len(texts), len(texts))
        return pairs

    @cached_property
    def _samplers(self) -> tuple[Sampler, Sampler]:
        """What draws the subwords of a source and of a target: one for both where they share a vocabulary."""

        def sampler(vocabulary: Vocabulary) -> Sampler:
            assert isinstance(vocabulary, Subwords)
            return vocabulary.sampler(self._data.vocabulary, self._data.subword_sampling)

        source = sampler(self.source_vocabulary)
        return source, source if self.target_vocabulary is self.source_vocabulary else sampler(self.target_vocabulary)

    def _source(self, text: str) -> str:
        """A source as the vocabulary knows it: a line, as that which `dl7 translate` is given."""
        return self._target(on_one_line(text))

    def _target(self, text: str) -> str:
        """A target as the vocabulary knows it."""
        return text.strip().lower() if self._data.lowercase else text.strip()


def even(lengths: np.ndarray) -> np.ndarray:
    """Steps of a batch whose longest member has so many: one more where that is odd, so that there are few shapes."""
    steps: np.ndarray = lengths + lengths % 2
    return steps


def fill(order: np.ndarray, lengths: np.ndarray, tokens: int, *, few_sizes: bool = False) -> list[np.ndarray]:
    """Cut `order` into runs whose longest member times their number is at most `tokens`; at least one each.

    For `few_sizes` only the first four binary digits of the number of members are kept, but for the last run: 184
    becomes 176. oneDNN writes code for every new shape of a product in bfloat16, which takes several times as long as
    the product.
    """
    batches = []
    begin = 0
    while begin < len(order):
        longest = np.maximum.accumulate(lengths[order[begin : begin + tokens]])
        count = max(1, int((longest * np.arange(1, len(longest) + 1) <= tokens).sum()))
        if few_sizes and begin + count < len(order):
            count -= count % (1 << max(0, count.bit_length() - 4))
        batches.append(order[begin : begin + count])
        begin += count
    return batches


def _rectangle(rows: list[list[int]]) -> Tensor:
    """Rows of ids as one tensor (B, steps), padded."""
    longest = max(len(row) for row in rows)
    steps = longest + longest % 2  # see `even`
    return torch.tensor([row + [PAD] * (steps - len(row)) for row in rows])
