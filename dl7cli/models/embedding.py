"""Words as vectors, and vectors as scores of words: three matrices, or fewer where they are tied."""

from typing import Literal

from torch import Tensor, nn

Tied = Literal["all", "output", "none"]


class Embeddings(nn.Module):
    """`source` and `target` words to vectors of `width`, and `output` from such a vector to scores of target words.

    Tied as in Press & Wolf 2017 (arXiv 1608.05859): `all` is one matrix for the three, `output` one for target and
    output. Weights start from N(0, deviation²), padding at zero. Raises ValueError where `all` has two vocabularies.
    """

    def __init__(
        self,
        source_words: int,
        target_words: int,
        width: int,
        *,
        pad: int,
        tied: Tied,
        deviation: float,
        output_bias: bool,
    ) -> None:
        super().__init__()
        if tied == "all" and source_words != target_words:
            raise ValueError(f"one matrix cannot serve vocabularies of {source_words} and {target_words} words")
        self.target = nn.Embedding(target_words, width, padding_idx=pad)
        self.source = self.target if tied == "all" else nn.Embedding(source_words, width, padding_idx=pad)
        self.output = nn.Linear(width, target_words, bias=output_bias)
        for embedding in (self.target, self.source):
            nn.init.normal_(embedding.weight, std=deviation)
            nn.init.zeros_(embedding.weight[pad])
        if tied == "none":
            nn.init.normal_(self.output.weight, std=deviation)
        else:
            self.output.weight = self.target.weight
        if output_bias:
            nn.init.zeros_(self.output.bias)

    def scores(self, readout: Tensor, at: Tensor | None) -> Tensor:
        """As `Translator.logits`, of readout (R, T, width)."""
        flat = readout.flatten(0, 1)
        scores: Tensor = self.output(flat if at is None else flat.index_select(0, at))
        return scores
