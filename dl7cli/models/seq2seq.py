"""A recurrent sequence-to-sequence model with attention, after Bahdanau et al. 2015 and Luong et al. 2015.

The source is read by a bi-directional LSTM. The decoder is two LSTMs with the attention between them, as in the
conditional decoder of Sennrich et al. 2017 (Nematus, arXiv 1703.04357, §3): the lower one reads the target words so far
and asks, the upper one reads what attention found and answers. No state of a step depends on the words chosen by the
upper LSTM but through the target words themselves, so in training each LSTM runs over whole sequences at once; and
unlike a single LSTM under attention, the upper one remembers what has been translated.

Letters in shapes: B sentences, S source steps, T target steps, K beams, R = B·K hypotheses, V words, E embedding width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.attention import GeneralAttention
from dl7cli.models.recurrent import BidirectionalLSTM, run
from dl7cli.models.translator import Decoded, State, Translator


class Seq2Seq(Translator):
    """One embedding serves source, target and output words of a joint vocabulary (Press & Wolf 2017, "three-way")."""

    def __init__(
        self,
        vocabulary: int,
        *,
        pad: int,
        embedding_width: int,
        encoder_width: int,
        encoder_layers: int,
        decoder_width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        memory_width = 2 * encoder_width
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, embedding_width, padding_idx=pad)
        self.encoder = BidirectionalLSTM(embedding_width, encoder_width, encoder_layers, dropout)
        self.start_lower = nn.Linear(memory_width, decoder_width)
        self.start_upper = nn.Linear(memory_width, decoder_width)
        self.lower = nn.LSTM(embedding_width, decoder_width, batch_first=True)
        self.attention = GeneralAttention(decoder_width, memory_width)
        self.upper = nn.LSTM(decoder_width + memory_width, decoder_width, batch_first=True)
        self.readout = nn.Linear(decoder_width + memory_width + embedding_width, embedding_width)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.embedding.weight, std=embedding_width**-0.5)
        with torch.no_grad():
            self.embedding.weight[pad].zero_()

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[State, State]:
        """As `Translator.encode`; context: memory, keys, mask."""
        embedded = functional.dropout(self.embedding(source), self.dropout, self.training)
        memory, last = self.encoder(embedded, lengths)
        memory = functional.dropout(memory, self.dropout, self.training)
        mask = torch.arange(source.size(1), device=source.device) < lengths[:, None]
        lower, upper = torch.tanh(self.start_lower(last)), torch.tanh(self.start_upper(last))
        state = (lower, torch.zeros_like(lower), upper, torch.zeros_like(upper))
        return (memory, self.attention.keys(memory), mask), state

    def decode(self, previous: Tensor, context: State, state: State) -> Decoded:
        memory, keys, mask = context
        embedded = functional.dropout(self.embedding(previous), self.dropout, self.training)
        asked, (lower, lower_cell) = run(self.lower, embedded, (state[0][None], state[1][None]))
        asked = functional.dropout(asked, self.dropout, self.training)
        queries = asked.reshape(memory.size(0), -1, asked.size(2))
        found, weights = self.attention(queries, keys, memory, mask)
        found = found.reshape(*asked.shape[:2], memory.size(2))
        answered, (upper, upper_cell) = run(
            self.upper, torch.cat([asked, found], dim=2), (state[2][None], state[3][None])
        )
        answered = functional.dropout(answered, self.dropout, self.training)
        readout = torch.tanh(self.readout(torch.cat([answered, found, embedded], dim=2)))
        readout = functional.dropout(readout, self.dropout, self.training)
        after = (lower[0], lower_cell[0], upper[0], upper_cell[0])
        return Decoded(readout, weights.reshape(*asked.shape[:2], memory.size(1)), after)

    def logits(self, decoded: Decoded, context: State, at: Tensor | None = None) -> Tensor:
        readout = decoded.readout.flatten(0, 1)
        readout = readout if at is None else readout.index_select(0, at)
        return functional.linear(readout, self.embedding.weight, self.output_bias)
