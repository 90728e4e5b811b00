"""`Seq2Seq` for one unpadded sentence pair, step by step as the papers' equations read: what tests compare with."""

import torch
from torch import Tensor, nn

from dl7cli.models.recurrent import Encoder, Transitions
from dl7cli.models.seq2seq import Seq2Seq

State = list[Tensor]


def cell(network: nn.RNNBase, x: Tensor, state: State) -> State:
    """One step for one row, gate by gate."""
    weight, recurrent, bias, recurrent_bias = network.all_weights[0]
    return gates(network.mode, weight @ x + bias, recurrent @ state[0] + recurrent_bias, state)


def gates(mode: str, entering: Tensor, recurring: Tensor, state: State) -> State:
    if mode == "LSTM":
        enter, forget, candidate, leave = (entering + recurring).chunk(4)
        memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(candidate)
        return [torch.sigmoid(leave) * torch.tanh(memory), memory]
    if mode == "GRU":
        (reset, keep, candidate), (reset_r, keep_r, candidate_r) = entering.chunk(3), recurring.chunk(3)
        kept = torch.sigmoid(keep + keep_r)
        new = torch.tanh(candidate + torch.sigmoid(reset + reset_r) * candidate_r)
        return [kept * state[0] + (1 - kept) * new]
    return [torch.tanh(entering + recurring)]


def read(network: nn.Module, xs: list[Tensor]) -> tuple[list[Tensor], State]:
    """One layer over a sentence → outputs, state after its last word."""
    first = network.first if isinstance(network, Transitions) else network
    assert isinstance(first, nn.RNNBase)
    state = [torch.zeros(first.hidden_size, dtype=xs[0].dtype)] * (2 if first.mode == "LSTM" else 1)
    outputs = []
    for x in xs:
        state = cell(first, x, state)
        for further in network.further if isinstance(network, Transitions) else []:
            assert isinstance(further, nn.Linear)
            recurring = further.weight @ state[0] + further.bias
            state = gates(first.mode, torch.zeros_like(recurring), recurring, state)
        outputs.append(state[0])
    return outputs, state


def encoder(net: Encoder, xs: list[Tensor]) -> tuple[list[Tensor], list[State]]:
    """Outputs at every word, and of every layer the state after the last one, both directions side by side."""
    ahead = back = xs
    ends: list[State] = []
    for at, network in enumerate(net.forwards):
        below = ahead, back
        if not net.backwards:
            ahead, end = read(network, ahead)
            ends.append(end)
        else:
            # The stack that begins backward, and each second layer of one that alternates, read from the end.
            turned = bool(net.alternating and at % 2)
            ahead, end_ahead = read(network, ahead[::-1] if turned else ahead)
            ahead = ahead[::-1] if turned else ahead
            back, end_back = read(net.backwards[at], back if turned else back[::-1])
            back = back if turned else back[::-1]
            ends.append([torch.cat(parts) for parts in zip(end_ahead, end_back, strict=True)])
            if not net.alternating:
                ahead = back = [torch.cat(both) for both in zip(ahead, back, strict=True)]
        if net.residual and at > 0:
            ahead = [one + x for one, x in zip(ahead, below[0], strict=True)]
            back = [one + x for one, x in zip(back, below[1], strict=True)]
    if net.alternating:
        return [torch.cat(both) for both in zip(ahead, back, strict=True)], ends
    return ahead, ends


def attention(net: Seq2Seq, query: Tensor, memory: list[Tensor], covered: Tensor) -> tuple[Tensor, Tensor]:
    """What is found in the memory, and the weights."""
    it, values, kind = net.attention, torch.stack(memory), net.options.attention
    if kind == "multihead":
        key, value = (values @ it.project.weight.T + it.project.bias).chunk(2, dim=1)
        asked = it.query.weight @ query + it.query.bias
        width = len(asked) // it.heads
        parts, all_weights = [], []
        for head in range(it.heads):
            here = slice(head * width, (head + 1) * width)
            scores = key[:, here] @ asked[here] / width**0.5
            all_weights.append(scores.exp() / scores.exp().sum())
            parts.append(all_weights[-1] @ value[:, here])
        found = it.join.weight @ torch.cat(parts) + it.join.bias
        return found, sum(all_weights, start=torch.zeros(())) / it.heads
    scores = []
    for one, seen in zip(memory, covered, strict=True):
        match kind:
            case "dot":
                scores.append(query @ one)
            case "general":
                scores.append(query @ (it.project.weight @ one))
            case _:
                inner = it.query.weight @ query + it.query.bias + it.project.weight @ one
                if net.options.coverage:
                    inner = inner + it.covered.weight[:, 0] * seen
                scores.append(it.energy.weight[0] @ torch.tanh(inner))
    weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
    return weights @ values, weights


def log_probabilities(net: Seq2Seq, source: list[int], previous: list[int]) -> tuple[Tensor, Tensor]:
    """(T, V), and the attention (T, S), empty where there is none."""
    options = net.options
    source_embedding = net.embedding if net.source_embedding is None else net.source_embedding
    memory, ends = encoder(net.encoder, [source_embedding.weight[word] for word in source])
    layers = [one for one in (net.lower, net.upper, *net.higher) if one is not None]
    if options.attention == "none":
        states = ends
        if net.bridges:
            bridges = iter(net.bridges)
            states = [[one.weight @ part + one.bias for part, one in zip(end, bridges, strict=False)] for end in ends]
    else:
        starts = [one for one in (net.start_lower, net.start_upper, *net.start_higher) if one is not None]
        begins = [torch.tanh(one.weight @ ends[-1][0] + one.bias) for one in starts]
        states = [[one, torch.zeros_like(one)] if options.cell == "lstm" else [one] for one in begins]
    covered = torch.zeros(len(source), dtype=memory[0].dtype)
    fed = torch.zeros(options.readout_width or options.embedding_width, dtype=memory[0].dtype)
    rows, looked = [], []
    for word in previous:
        x = embedded = net.embedding.weight[word]
        if options.input_feeding:
            x = torch.cat([x, fed])
        found = None
        for at, one in enumerate(layers):
            if options.attention != "none" and (one is net.upper):
                query = states[-1][0] if net.lower is None else x
                found, weights = attention(net, query, memory, covered)
                x = torch.cat([x, found])
            states[at] = cell(one, x, states[at])
            x = states[at][0] + x if options.residual and one in list(net.higher) else states[at][0]
        if options.attention != "none" and found is None:
            found, weights = attention(net, x, memory, covered)
        heard = [x] if found is None else [x, found] if options.decoder == "luong" else [x, found, embedded]
        readout = net.readout.weight @ torch.cat(heard) + net.readout.bias
        maxout = options.readout == "maxout"
        fed = torch.maximum(readout[0::2], readout[1::2]) if maxout else torch.tanh(readout)
        output = net.embedding.weight if net.output_weight is None else net.output_weight
        logits = output @ fed + net.output_bias
        probabilities = logits.exp() / logits.exp().sum()
        if found is not None:
            covered = covered + weights
            looked.append(weights)
        if options.copying:
            say = torch.sigmoid(net.gate.weight[0] @ torch.cat([found, x, embedded]) + net.gate.bias)
            probabilities = probabilities * say
            for at, copied in enumerate(source):
                probabilities[copied] = probabilities[copied] + (1 - say[0]) * weights[at]
        rows.append(probabilities.log())
    return torch.stack(rows), torch.stack(looked) if looked else torch.empty(0)
