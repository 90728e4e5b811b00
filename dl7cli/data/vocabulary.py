"""Vocabularies: subwords by sentencepiece on raw text, or words, or characters.

Text is taken as it is (no normalisation), so that what was encoded is what is decoded, with two exceptions: what the
vocabulary does not hold comes back as `�`, and of subwords the mark `▁`, by which sentencepiece writes a space, as one.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import sentencepiece

from dl7cli.data.segmentation import BPEDropout, UnigramSampling
from dl7cli.errors import UserError
from dl7cli.letters import MARKS

PAD, UNKNOWN, BOS, EOS = 0, 1, 2, 3
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
"""How the special ids are shown. They have no spelling: where a text has these, they are characters like any others."""

_SPACE = "▁"
_SUBWORD_WORD = re.compile(f"{_SPACE}[^{_SPACE}]*")
_WORD = re.compile(rf" ?(?:[\w{MARKS}]+|[^\w{MARKS} ])|.", re.DOTALL)


class Vocabulary:
    """Text to ids and back; the four special ids are the same in every vocabulary."""

    @staticmethod
    def train(lines: Iterable[str], size: int, kind: str = "bpe") -> "Vocabulary":
        """Learn at most `size` entries (specials included) from `lines`; the same lines give the same vocabulary.

        `kind` is `bpe` (Sennrich et al. 2016), `unigram` (Kudo 2018), `word` or `character`. Raises UserError where
        there is no text, and where it has more characters than subwords have room for.
        """
        lines = list(lines)
        if not any(lines):
            raise UserError("no vocabulary can be learnt: there is no text", hint="add training pairs")
        if kind in ("bpe", "unigram"):
            return Subwords.learn(lines, size, kind)
        return Words.learn(lines, size, kind)

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Vocabulary":
        """The vocabulary that `to_json` wrote down. Raises UserError where this is none, or of an unknown kind."""
        try:
            match document["kind"]:
                case "sentencepiece":
                    subwords = Subwords(base64.b64decode(document["model"], validate=True))
                    if len(subwords) <= len(SPECIALS):
                        raise ValueError("there is nothing in it")
                    return subwords
                case "word" | "character" as kind:
                    words = document["words"]
                    if not isinstance(words, list):
                        raise TypeError("words are a list")
                    "".join(words).encode()  # raises for what is not text
                    return Words(kind, words)
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError("the vocabulary of the checkpoint is damaged", hint="train again") from None
        raise UserError(
            f"the vocabulary of the checkpoint is of a kind not known here, `{document['kind']}`", hint="upgrade dl7"
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to give the same vocabulary back."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many lines at once."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; pad, bos and eos leave nothing, what is unknown leaves `�`."""
        raise NotImplementedError

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for, with `▁` for a space; `</s>` for eos."""
        raise NotImplementedError


class Subwords(Vocabulary):
    """Of sentencepiece, with a mark before each word for the space there, or for the beginning of the text."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def learn(cls, lines: Sequence[str], size: int, kind: str) -> "Subwords":
        written = io.BytesIO()
        # The names of the specials end in a line feed, which a line has not: sentencepiece would keep their letters,
        # found in a text, out of the vocabulary.
        pad, unknown, bos, eos = (f"{name}\n" for name in SPECIALS)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=written,
                model_type=kind,
                vocab_size=size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=BOS,
                eos_id=EOS,
                pad_piece=pad,
                unk_piece=unknown,
                bos_piece=bos,
                eos_piece=eos,
                unk_surface="�",
                num_threads=1,
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"no vocabulary of {size} subwords can be learnt from this text: {str(error).rpartition('] ')[2]}",
                hint="try another `--set data.vocabulary_size=N`",
            ) from error
        return cls(written.getvalue())

    def to_json(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")}

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[one] if one <= EOS else str(self._processor.id_to_piece(one)) for one in ids]

    def sampler(self, kind: str, amount: float) -> Callable[[str, Random], list[int]]:
        """`sample(text, random)` is `encode` with a segmentation drawn at random, by the numbers of `random` alone.

        `kind` is what the vocabulary was learnt as. `amount` is of `bpe` the probability that a merge is left out, of
        `unigram` the exponent α. An unknown character is an id by itself.
        """
        ids = {str(self._processor.id_to_piece(one)): one for one in range(EOS + 1, len(self))}
        scores = {piece: float(self._processor.get_score(one)) for piece, one in ids.items()}
        drawn = UnigramSampling(scores, amount) if kind == "unigram" else BPEDropout(scores, amount)

        def sample(text: str, random: Random) -> list[int]:
            words = _SUBWORD_WORD.findall(_SPACE + text.replace(" ", _SPACE)) if text else []
            return [ids.get(piece, UNKNOWN) for word in words for piece in drawn.sample(word, random)]

        return sample


class Words(Vocabulary):
    """The most frequent words or characters; any other is unknown.

    A word is a run of letters, digits and their accents, or any other character alone, in either case with the space
    before it; the text itself begins as if there were a space. Joined, they are the text.
    """

    def __init__(self, kind: str, words: Sequence[str]) -> None:
        self._kind = kind
        self._words = list(words)
        self._ids = {word: one for one, word in enumerate(self._words, start=EOS + 1)}

    @classmethod
    def learn(cls, lines: Sequence[str], size: int, kind: str) -> "Words":
        counts = Counter(word for line in lines for word in _cut(line, kind))
        return cls(kind, sorted(counts, key=lambda word: (-counts[word], word))[: size - len(SPECIALS)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self._kind, "words": self._words}

    def __len__(self) -> int:
        return len(SPECIALS) + len(self._words)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._ids.get(word, UNKNOWN) for word in _cut(text, self._kind)] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        space = " " if self._kind == "word" else ""
        specials = ("", f"{space}�", "", "")
        words = [specials[one] if one <= EOS else self._words[one - len(SPECIALS)] for one in ids]
        return "".join(words).removeprefix(space)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        words = [SPECIALS[one] if one <= EOS else self._words[one - len(SPECIALS)] for one in ids]
        return [word.replace(" ", _SPACE) for word in words]


def _cut(text: str, kind: str) -> list[str]:
    if kind == "character" or not text:
        return list(text)
    return _WORD.findall(f" {text}")
