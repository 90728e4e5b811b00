"""Target tokens per second in training: dl7's loop, the same in float32, and the loop as commonly written.

The common one has the equations and sizes of dl7's model and a process of its own, so that only the manner differs:
float32, shuffled batches of as many sentences as dl7's hold on average, a packed encoder, one Python step of LSTMCells
and attention per target token, cross-entropy over all positions with padding ignored, `loss.item()` every step. Padding
is never counted.

    python tests/benchmarks/seq2seq_training.py --data FOLDER [--set model.decoder_width=256]
"""

import torch
from alternating import Loop, apart, arguments, compare, own_loop
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from dl7cli import device, tasks
from dl7cli.data.pairs import read_pairs
from dl7cli.data.vocabulary import BOS, EOS, PAD
from dl7cli.recipe import Seq2SeqModel, TranslationRecipe, resolve
from dl7cli.tasks.translation import Translation

Pair = tuple[list[int], list[int]]


class StepByStep(nn.Module):
    """dl7's `Seq2Seq` with a packed encoder and a decoder that makes one step at a time."""

    def __init__(self, vocabulary: int, sizes: Seq2SeqModel) -> None:
        super().__init__()
        embedding, decoder, memory = sizes.embedding_width, sizes.decoder_width, 2 * sizes.encoder_width
        self.dropout = nn.Dropout(sizes.dropout)
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.encoder = nn.LSTM(
            embedding,
            sizes.encoder_width,
            sizes.encoder_layers,
            batch_first=True,
            bidirectional=True,
            dropout=sizes.dropout if sizes.encoder_layers > 1 else 0.0,
        )
        self.start = nn.Linear(memory, 2 * decoder)
        self.lower = nn.LSTMCell(embedding, decoder)
        self.keys = nn.Linear(memory, decoder, bias=False)
        self.upper = nn.LSTMCell(decoder + memory, decoder)
        self.readout = nn.Linear(decoder + memory + embedding, embedding)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """source (B, S), lengths (B,) on the CPU, previous (B, T) → logits (B, T, V)."""
        embedded = self.dropout(self.embedding(source))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        outputs, (last, _) = self.encoder(packed)
        memory = self.dropout(pad_packed_sequence(outputs, batch_first=True)[0])
        keys = self.keys(memory)
        padding = source == PAD
        begin_lower, begin_upper = torch.tanh(self.start(torch.cat([last[-2], last[-1]], dim=1))).chunk(2, dim=1)
        lower = (begin_lower, torch.zeros_like(begin_lower))
        upper = (begin_upper, torch.zeros_like(begin_upper))
        readouts = []
        for word in self.dropout(self.embedding(previous)).unbind(dim=1):
            lower = self.lower(word, lower)
            asked = self.dropout(lower[0])
            scores = torch.bmm(keys, asked[:, :, None])[:, :, 0].masked_fill(padding, float("-inf"))
            found = torch.bmm(scores.softmax(dim=1)[:, None], memory)[:, 0]
            upper = self.upper(torch.cat([asked, found], dim=1), upper)
            answered = self.dropout(upper[0])
            readouts.append(torch.tanh(self.readout(torch.cat([answered, found, word], dim=1))))
        return functional.linear(self.dropout(torch.stack(readouts, dim=1)), self.embedding.weight, self.output_bias)


def collate(pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs → source (B, S), its lengths (B,), previous (B, T) and target (B, T) words."""

    def padded(rows: list[list[int]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)

    sources = [[*source, EOS] for source, _ in pairs]
    previous = padded([[BOS, *target] for _, target in pairs])
    target = padded([[*target, EOS] for _, target in pairs])
    return padded(sources), torch.tensor([len(source) for source in sources]), previous, target


def usual_loop(pairs: list[Pair], vocabulary: int, recipe: TranslationRecipe, *, batch: int, on: torch.device) -> Loop:
    """The loop of most examples of recurrent translation."""
    model = StepByStep(vocabulary, recipe.model).to(on)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader: DataLoader[Pair] = DataLoader(pairs, batch, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    running_loss = 0.0
    model.train()
    while True:
        for source, lengths, previous, target in loader:
            tokens = int((target != PAD).sum())
            source, previous, target = source.to(on), previous.to(on), target.to(on)
            optimiser.zero_grad()
            logits = model(source, lengths, previous)
            loss = functional.cross_entropy(
                logits.view(-1, logits.size(2)),
                target.view(-1),
                ignore_index=PAD,
                label_smoothing=recipe.training.label_smoothing,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            running_loss += loss.item()
            yield tokens


def encoded_pairs(task: Translation) -> list[Pair]:
    """The training pairs as subwords, without those longer than the recipe's limit."""
    data = task.recipe.data
    read = read_pairs(data.source, source_language=data.source_language, target_language=data.target_language)
    sources, targets = zip(*read.splits["train"], strict=True)
    both = zip(task.pairs.source_ids(sources), task.pairs.target_ids(targets), strict=True)
    return [pair for pair in both if max(map(len, pair)) <= data.max_length]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    options = parser.parse_args()
    recipe = resolve("seq2seq", options.set, data=options.data).recipe
    runtime = device.choose()
    task = tasks.build(recipe, runtime=runtime)
    if not isinstance(task, Translation):
        parser.error("the recipe is not one for translation")
    pairs = encoded_pairs(task)
    batch = round(len(pairs) / task.steps(0))
    loops = {"dl7": own_loop(task)}
    if runtime.precision != "fp32":
        loops["dl7 in fp32"] = own_loop(tasks.build(recipe, task.assets, runtime=device.choose(precision="fp32")))
    loops["the usual loop"] = apart(
        usual_loop,
        pairs=pairs,
        vocabulary=len(task.pairs.source_vocabulary),
        recipe=task.recipe,
        batch=batch,
        on=runtime.device,
    )
    compare(loops, options, runtime=runtime, unit="target tokens", sentences_per_batch=batch, overrides=options.set)


if __name__ == "__main__":
    main()
