"""Recurrent sequence-to-sequence models, from Sutskever et al. 2014 to pointer-generators, as options of one class.

An encoder reads the source. The decoder is a stack of recurrent layers with the attention somewhere in it:

- "conditional": between the two lowest, after the conditional decoder of Sennrich et al. 2017 (Nematus, arXiv
  1703.04357, §3): the lower one reads the target words so far and asks, the upper one reads what attention found. There
  one state goes through both; here each has a state of its own.
- "luong": on top (Luong et al. 2015, arXiv 1508.04025, §3): the highest layer asks. With input feeding (§3.3) the
  lowest layer also reads the readout of the step before.
- "bahdanau": below (Bahdanau et al. 2015, arXiv 1409.0473): the state of the step before asks, and the lowest layer
  reads the target word and what attention found.
- Without attention (Sutskever et al. 2014, arXiv 1409.3215) the final states of the encoder start the decoder.

In "conditional", and in "luong" without input feeding, no state of a step depends on what attention found for the
steps before but through the target words, or upwards: so in training each layer runs over whole sequences at once.

Letters in shapes: B sentences, S source steps, T target steps, R = B·K hypotheses, V words, E width of the readout, D
width of the decoder, M width of the encoder's outputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.attention import AdditiveAttention, Attention, DotAttention, GeneralAttention, MultiHeadAttention
from dl7cli.models.dropout import Dropout
from dl7cli.models.recurrent import Encoder, advance, layer, project, run, state_size
from dl7cli.models.translator import Decoded, State, Translator


@dataclass(frozen=True, kw_only=True)
class Seq2SeqOptions:
    """What a `Seq2Seq` is made of; the recipe's keys say what each means and which go together."""

    embedding_width: int
    cell: Literal["lstm", "gru", "rnn"]
    encoder_width: int
    encoder_layers: int
    encoder_direction: Literal["both", "forward"]
    encoder_stack: Literal["bidirectional", "alternating"]
    transition_depth: int
    decoder_width: int
    decoder_layers: int
    residual: bool
    attention: Literal["none", "additive", "dot", "general", "concat", "multihead"]
    heads: int
    decoder: Literal["conditional", "luong", "bahdanau"]
    input_feeding: bool
    readout: Literal["tanh", "maxout"]
    tied: Literal["all", "output", "none"]
    readout_width: int | None
    coverage: bool
    copying: bool
    dropout: float
    locked_dropout: bool


class Seq2Seq(Translator):
    """With `tied` = "all" one embedding serves source, target and output words of a joint vocabulary, with "output"
    one serves target and output words (Press & Wolf 2017, arXiv 1608.05859: "three-way" and "decoder" tying).
    """

    def __init__(self, options: Seq2SeqOptions, source_words: int, target_words: int, *, pad: int) -> None:
        super().__init__()
        self.options = options
        cell, embedding, units = options.cell, options.embedding_width, options.decoder_width
        width = options.readout_width or embedding
        self.dropout = Dropout(options.dropout, locked=options.locked_dropout)
        # Tied here and not by `Embeddings`, as the names of parameters are those of checkpoints from before it.
        self.embedding = nn.Embedding(target_words, embedding, padding_idx=pad)
        attends = options.attention != "none"
        self.encoder = Encoder(
            embedding,
            options.encoder_width,
            options.encoder_layers,
            dropout=self.dropout,
            cell=cell,
            both=options.encoder_direction == "both",
            alternating=options.encoder_stack == "alternating",
            residual=options.residual,
            depth=options.transition_depth,
            final=not attends,
        )
        memory = self.encoder.width
        has_lower = not attends or options.decoder != "bahdanau"
        has_upper = attends and options.decoder != "luong"
        self.start_lower = nn.Linear(memory, units) if attends and has_lower else None
        self.start_upper = nn.Linear(memory, units) if has_upper else None
        fed = width if options.input_feeding else 0
        self.lower = layer(cell, embedding + fed, units) if has_lower else None
        self.attention = _attention(options, memory) if attends else None
        self.upper = layer(cell, (units if has_lower else embedding) + memory, units) if has_upper else None
        said = units + (memory if attends else 0) + (embedding if has_upper else 0)
        self.readout = nn.Linear(said, (2 if options.readout == "maxout" else 1) * width)
        self.output_bias = nn.Parameter(torch.zeros(target_words))
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        nn.init.zeros_(self.embedding.weight[pad])
        count = options.decoder_layers - 1
        self.higher = nn.ModuleList(layer(cell, units, units) for _ in range(count))
        self.start_higher = nn.ModuleList(nn.Linear(memory, units) for _ in range(count if attends else 0))
        parts = sum(state_size(one) for one in self._layers) if not attends and memory != units else 0
        self.bridges = nn.ModuleList(nn.Linear(memory, units) for _ in range(parts))
        self.gate = nn.Linear(units + memory + embedding, 1) if options.copying else None
        self.source_embedding = None
        if options.tied != "all":
            self.source_embedding = nn.Embedding(source_words, embedding, padding_idx=pad)
            nn.init.normal_(self.source_embedding.weight, std=embedding**-0.5)
            nn.init.zeros_(self.source_embedding.weight[pad])
        self.output_weight = None
        if options.tied == "none":
            self.output_weight = nn.Parameter(torch.empty(target_words, width).normal_(std=width**-0.5))

    @property
    def _layers(self) -> list[nn.RNNBase]:
        """Of the decoder, from below."""
        return [one for one in (self.lower, self.upper, *self.higher) if isinstance(one, nn.RNNBase)]

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[State, State]:
        """As `Translator.encode`; context: memory, keys, mask and, for copying, source; none without attention.

        State: of every layer of the decoder; then what was covered, (R, S), and what is fed, (R, E), where there is
        such a thing.
        """
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        memory, ends = self.encoder(self.dropout(embedding(source)), lengths)
        if self.attention is None:
            parts = [part for end in ends for part in end]
            if self.bridges:
                parts = [bridge(part) for bridge, part in zip(self.bridges, parts, strict=True)]
            return (), tuple(parts)
        memory = self.dropout(memory)
        mask = torch.arange(source.size(1), device=source.device) < lengths[:, None]
        context = (memory, self.attention.keys(memory), mask)
        starts = (self.start_lower, self.start_upper, *self.start_higher)
        state = []
        for start in (one for one in starts if one is not None):
            begin = torch.tanh(start(ends[-1][0]))
            state += [begin, torch.zeros_like(begin)] if self.options.cell == "lstm" else [begin]
        if self.options.coverage:
            state.append(torch.zeros_like(source, dtype=torch.promote_types(memory.dtype, torch.float32)))
        if self.options.input_feeding:
            state.append(memory.new_zeros(len(source), self.options.readout_width or self.options.embedding_width))
        return (*context, source) if self.options.copying else context, tuple(state)

    def decode(self, previous: Tensor, context: State, state: State) -> Decoded:
        embedded = self.dropout(self.embedding(previous))
        states, rest = self._unpacked(state)
        if self.options.input_feeding or (self.attention is not None and self.lower is None):
            return self._decode_by_steps(embedded, context, states, rest)
        layers = self._layers
        below = len(layers) if self.upper is None else 1
        asked, after = self._stack(layers[:below], embedded, states[:below])
        asked = answered = self.dropout(asked)
        found = weights = None
        covered: State = ()
        if self.attention is not None:
            found, weights, covered = self._attend(asked, context, rest)
            if below < len(layers):
                answered, after_above = self._stack(layers[below:], torch.cat([asked, found], dim=2), states[below:])
                answered = self.dropout(answered)
                after += after_above
        readout = self.dropout(self._readout(answered, found, embedded))
        readout = self._with_gate(readout, answered, found, embedded)
        return Decoded(readout, weights, (*(part for one in after for part in one), *covered))

    def begin(self, source: Tensor, lengths: Tensor, hypotheses: int) -> tuple[State, State]:
        """As `Translator.begin`. What attention finds is a weighted sum of the memory. Where the upper layer and the
        readout alone read it, what the memory brings to the gates of the one and to the other is one more part of the
        context, (B, S, 4D + E) with an LSTM and tanh: with several hypotheses a sentence it has fewer source steps than
        they have target steps.
        """
        context, state = self.encode(source, lengths)
        summed = self.attention is not None and not isinstance(self.attention, MultiHeadAttention)
        if hypotheses == 1 or not summed or self.options.decoder != "conditional" or self.gate is not None:
            return context, state
        assert self.upper is not None
        units, memory = self.options.decoder_width, context[0]
        to_gates = self.upper.all_weights[0][0][:, units:]
        to_readout = self.readout.weight[:, units : units + memory.size(2)]
        return (*context, functional.linear(memory, torch.cat([to_gates, to_readout]))), state

    def step(self, previous: Tensor, context: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        """As `Translator.step`. With what `begin` adds to the context nothing is dropped, and what depends on a word
        alone is computed once for all that have it.
        """
        if self.gate is not None or len(context) < 4:
            return super().step(previous, context, state)
        brought, keys, mask = context[3], *context[1:3]
        lower, upper, *higher = self._layers
        states, rest = self._unpacked(state)
        before, before_upper, *before_higher = [_wide(one) for one in states]
        words, place = _distinct(previous)
        embedded = self.embedding(words)
        after = [advance(lower, project(lower, embedded)[place], before)]
        asked = after[0][0]
        found, weights, covered = self._attend(asked[:, None], (brought, keys, mask), rest)
        gates = upper.all_weights[0][0].size(0)
        after.append(advance(upper, project(upper, asked) + found[:, 0, :gates], before_upper))
        answered = after[1][0]
        for one, its in zip(higher, before_higher, strict=True):
            after.append(advance(one, project(one, answered), its))
            answered = after[-1][0] + answered if self.options.residual else after[-1][0]
        weight, bias = self.readout.weight, self.readout.bias
        said = functional.linear(embedded, weight[:, -embedded.size(1) :], bias)[place]
        said = said + functional.linear(answered, weight[:, : answered.size(1)]) + found[:, 0, gates:]
        state = (*(part for one in after for part in one), *covered)
        return self.answer(Decoded(self._spoken(said)[:, None], weights, state), context)

    def logits(self, decoded: Decoded, context: State, at: Tensor | None = None) -> Tensor:
        """As `Translator.logits`; with copying the logarithms of probabilities, in float32 or wider.

        See et al. 2017, eq. 9: the mixture of what the decoder would say and of the source words it looks at.
        """
        readout = decoded.readout.flatten(0, 1)
        readout = readout if at is None else readout.index_select(0, at)
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        if self.gate is None:
            return functional.linear(readout, weight, self.output_bias)
        assert decoded.attention is not None
        logits = functional.linear(readout[:, :-1], weight, self.output_bias)
        looked = decoded.attention.flatten(0, 1)
        sentences = torch.arange(len(looked), device=looked.device) // (len(looked) // len(context[3]))
        if at is not None:
            looked, sentences = looked.index_select(0, at), sentences.index_select(0, at)
        gate = readout[:, -1:].to(looked.dtype)
        words = context[3].index_select(0, sentences)
        copied = torch.zeros_like(logits, dtype=looked.dtype).scatter_add(1, words, looked)
        copied = copied.clamp_min(torch.finfo(copied.dtype).tiny).log()
        said = logits.to(looked.dtype).log_softmax(dim=1)
        return torch.logaddexp(said + functional.logsigmoid(gate), copied + functional.logsigmoid(-gate))

    def _unpacked(self, state: State) -> tuple[list[State], State]:
        """The state of every layer, and the rest."""
        sizes = [state_size(one) for one in self._layers]
        layers = [state[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
        return layers, state[sum(sizes) :]

    def _stack(self, layers: list[nn.RNNBase], x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Run layers over whole sequences x (R, T, W) → outputs (R, T, D) of the highest, states after."""
        after = []
        for at, (one, state) in enumerate(zip(layers, states, strict=True)):
            below = x if at == 0 else self.dropout(x)
            x, end = run(one, below, state)
            x = x + below if self.options.residual and at > 0 else x
            after.append(end)
        return x, after

    def _attend(self, queries: Tensor, context: State, covered: State) -> tuple[Tensor, Tensor, State]:
        """queries (R, T, D), covered: (R, S) where there is coverage → found (R, T, M), weights (R, T, S), covered."""
        assert self.attention is not None
        memory, keys, mask = context[:3]
        rows, steps, _ = queries.shape
        if not self.options.coverage:
            found, weights = self.attention(queries.reshape(len(memory), -1, queries.size(2)), keys, memory, mask)
            return found.reshape(rows, steps, -1), weights.reshape(rows, steps, -1), ()
        total = covered[0].view(len(memory), -1, keys.size(1))
        all_found, all_weights = [], []
        for query in queries.view(len(memory), -1, *queries.shape[1:]).unbind(dim=2):
            found, weights = self.attention(query, keys, memory, mask, total)
            total = total + weights
            all_found.append(found.flatten(0, 1))
            all_weights.append(weights.flatten(0, 1))
        return torch.stack(all_found, dim=1), torch.stack(all_weights, dim=1), (total.flatten(0, 1),)

    def _decode_by_steps(self, embedded: Tensor, context: State, states: list[State], rest: State) -> Decoded:
        """Where a step needs what the one before it has found: embedded (R, T, W), state of every layer, the rest."""
        layers, drop = self._layers, self.dropout.by_steps()
        states = [_wide(one) for one in states]
        covered, fed = (rest[:1], rest[1:]) if self.options.coverage else ((), rest)
        all_entering = project(layers[0], embedded)
        extra_weight = layers[0].all_weights[0][0][:, embedded.size(2) :].to(all_entering.dtype)
        all_answered, all_found, all_weights, readouts = [], [], [], []
        for word, entering in zip(embedded.unbind(dim=1), all_entering.unbind(dim=1), strict=True):
            if not fed:
                found, weights, covered = self._attend(states[-1][0][:, None], context, covered)
            extra = fed[0] if fed else found[:, 0]
            states[0] = advance(layers[0], entering + functional.linear(extra, extra_weight), states[0])
            answered = states[0][0]
            for at, one in enumerate(layers[1:], start=1):
                below = drop(at, answered)
                states[at] = advance(one, project(one, below), states[at])
                answered = states[at][0] + below if self.options.residual else states[at][0]
            answered = drop(0, answered)
            if fed:
                found, weights, covered = self._attend(answered[:, None], context, covered)
                fed = (drop(-1, self._readout(answered, found[:, 0], word)),)
                readouts.append(fed[0])
            all_answered.append(answered)
            all_found.append(found[:, 0])
            all_weights.append(weights[:, 0])
        answered, found = torch.stack(all_answered, dim=1), torch.stack(all_found, dim=1)
        readout = torch.stack(readouts, dim=1) if fed else self.dropout(self._readout(answered, found, embedded))
        readout = self._with_gate(readout, answered, found, embedded)
        after = (*(part for one in states for part in one), *covered, *fed)
        return Decoded(readout, torch.stack(all_weights, dim=1), after)

    def _readout(self, answered: Tensor, found: Tensor | None, embedded: Tensor) -> Tensor:
        """Of one step or of all: what the decoder says, what it looked at and the word before → (…, E).

        Bahdanau et al. 2015, appendix A.2.2, but for the state of this step instead of the one before; with attention
        on top Luong et al. 2015, eq. 5, which leaves the word out.
        """
        heard = [answered] if found is None else [answered, found]
        return self._spoken(self.readout(torch.cat([*heard, embedded] if self.upper is not None else heard, dim=-1)))

    def _spoken(self, readout: Tensor) -> Tensor:
        """What follows the matrix of the readout."""
        if self.options.readout == "maxout":
            return torch.amax(readout.view(*readout.shape[:-1], -1, 2), dim=-1)
        return torch.tanh(readout)

    def _with_gate(self, readout: Tensor, answered: Tensor, found: Tensor | None, embedded: Tensor) -> Tensor:
        """With copying, one more value in the readout: the logit of saying and not copying (See et al. 2017, eq. 8)."""
        if self.gate is None:
            return readout
        assert found is not None
        return torch.cat([readout, self.gate(torch.cat([found, answered, embedded], dim=2)).to(readout.dtype)], dim=2)


def _wide(state: State) -> State:
    """A sum over many steps, which loses what is small in half of the digits, in float32 or wider."""
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in state)


def _distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """Each of `words` (R,) once, and which of these each is.

    They stay as they are on a GPU, which would be waited for, and in autocast, where a CPU writes code for each number.
    """
    if words.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return words.unique(return_inverse=True)  # type: ignore[no-any-return,no-untyped-call]
    return words, torch.arange(len(words), device=words.device)


def _attention(options: Seq2SeqOptions, memory: int) -> Attention:
    match options.attention:
        case "dot":
            return DotAttention()
        case "general":
            return GeneralAttention(options.decoder_width, memory)
        case "multihead":
            return MultiHeadAttention(options.decoder_width, memory, options.heads)
        case _:
            return AdditiveAttention(options.decoder_width, memory, coverage=options.coverage)
