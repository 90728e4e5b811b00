"""Subword vocabularies: sentencepiece BPE (Sennrich et al. 2016) on raw text, one for both languages."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from dl7cli.errors import UserError

PAD, UNKNOWN, BOS, EOS = 0, 1, 2, 3


class Vocabulary:
    """Text to ids and back; the four special ids are the same in every vocabulary."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, lines: Iterable[str], size: int) -> "Vocabulary":
        """Learn at most `size` subwords (specials included) from `lines`; the same lines give the same vocabulary.

        Text is taken as it is (no normalisation), so that what was encoded is what is decoded. Raises UserError where
        the text has more characters than the vocabulary has room for.
        """
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=written,
                model_type="bpe",
                vocab_size=size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=BOS,
                eos_id=EOS,
                unk_surface="�",
                num_threads=1,
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"no vocabulary of {size} subwords can be learnt from this text: {str(error).splitlines()[-1]}",
                hint="try another `--set data.vocabulary_size=N`",
            ) from error
        return cls(written.getvalue())

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Ids of the subwords of `text`, without bos and eos."""
        return list(self._processor.encode(text))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many lines at once."""
        return [list(ids) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of subword ids; specials leave nothing."""
        return str(self._processor.decode(list(ids)))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The subwords of ids as they are written in the vocabulary, `</s>` for eos."""
        return [str(self._processor.id_to_piece(one)) for one in ids]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to give the same vocabulary back."""
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Vocabulary":
        return cls(base64.b64decode(document["model"]))
