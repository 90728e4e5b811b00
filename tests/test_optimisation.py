"""Optimisers, schedules and the average of the weights, each against a slow loop, a decomposition or torch's own."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import Silent
from torch import nn

from dl7cli import checkpoint, tasks, training
from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime
from dl7cli.models.resnet import ResNet
from dl7cli.recipe import Optim, resolve
from dl7cli.runs import Run
from dl7cli.tasks.translation import translator
from dl7cli.training.loop import Trainer, fit
from dl7cli.training.optimisation import (
    WeightAverage,
    build_optimiser,
    learning_rate,
    optimiser_tensors,
    orthogonalise,
    restore_optimiser,
    swapped,
)

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024


def optim(**changes: Any) -> Optim:
    return Optim.model_validate({"name": "sgd", "learning_rate": 2.0, "warmup": 0.2, **changes})


def newton_schulz(matrix: np.ndarray, iterations: int = 5) -> np.ndarray:
    """The iteration as published, on singular values alone: a polynomial in X acts on each of them."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values /= np.linalg.norm(values)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@pytest.mark.parametrize(("rows", "columns"), [(4, 36), (16, 16), (20, 5), (1, 9)])
def test_matrices_are_made_orthogonal_as_their_singular_values_say(rows: int, columns: int) -> None:
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1))
    matrices[1] *= 1e-6
    found = orthogonalise(matrices)
    for matrix, orthogonal in zip(matrices, found, strict=True):
        assert np.abs(orthogonal.numpy() - newton_schulz(matrix.numpy())).max() < 1e-4
    assert torch.isfinite(orthogonalise(torch.zeros(1, rows, columns))).all()


@pytest.mark.filterwarnings("ignore:Please use the new API settings")
def test_a_gpu_keeps_all_digits_of_what_is_made_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its user or a container spares some for speed: the iteration would make 1.7 of a singular value of 1."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    allowed: list[bool] = []
    product = torch.baddbmm

    def observed(*arguments: Any, **options: Any) -> torch.Tensor:
        allowed.append(matmul.allow_tf32)
        return product(*arguments, **options)

    monkeypatch.setattr(torch, "baddbmm", observed)
    try:
        matmul.allow_tf32 = True
        orthogonalise(torch.randn(1, 4, 9))
        assert set(allowed) == {False}
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_a_gradient_of_few_directions_is_made_orthogonal_too() -> None:
    """What rounding adds to singular values of zero must not grow beyond those that are there."""
    torch.manual_seed(1)
    matrices = torch.randn(3, 64, 4) @ torch.randn(3, 4, 128)
    for matrix, orthogonal in zip(matrices, orthogonalise(matrices), strict=True):
        assert np.abs(orthogonal.numpy() - newton_schulz(matrix.numpy())).max() < 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_is_the_published_step_for_filters_and_sgd_for_the_rest(layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    model = ResNet(8, 10).to(memory_format=layout)
    own = {name: value.detach().double().numpy().copy() for name, value in model.named_parameters()}
    filters = {name for name, value in own.items() if name.startswith("blocks") and value.ndim == 4}
    assert len(filters) == 6
    others = [
        value.detach().clone().requires_grad_() for name, value in model.named_parameters() if name not in filters
    ]
    sgd = torch.optim.SGD(
        [
            {"params": [value for value in others if value.ndim > 1], "weight_decay": 0.01},
            {"params": [value for value in others if value.ndim == 1]},
        ],
        lr=0.3,
        momentum=0.8,
        nesterov=True,
    )
    muon = build_optimiser(
        model, optim(name="muon", learning_rate=0.1, other_learning_rate=0.3, momentum=0.8, weight_decay=0.01)
    )
    for group in muon.param_groups:
        group["lr"] = 0.1 * group["share"]
    momentum = {name: np.zeros_like(own[name]) for name in filters}
    for _ in range(3):
        remaining = iter(others)
        for name, value in model.named_parameters():
            value.grad = torch.randn_like(value)
            if name not in filters:
                next(remaining).grad = value.grad.clone()
                continue
            gradient = value.grad.double().numpy()
            momentum[name] = 0.8 * momentum[name] + gradient
            rows = len(gradient)
            step = newton_schulz((gradient + 0.8 * momentum[name]).reshape(rows, -1)).reshape(gradient.shape)
            own[name] = own[name] * math.sqrt(rows) / np.linalg.norm(own[name]) - 0.1 * step
        muon.step()
        sgd.step()
    remaining = iter(others)
    for name, value in model.named_parameters():
        if name in filters:
            assert np.abs(value.detach().numpy() - own[name]).max() < 1e-4, name
        else:
            assert torch.allclose(value, next(remaining), atol=1e-6), name


def test_muon_takes_filters_with_more_rows_than_columns_and_all_but_the_first() -> None:
    """A bank of 64 1x1 filters over 16 channels: the step is √(64/16) times the orthogonal matrix. Few channels are no
    colours: the second convolution reads three, too.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 1))
    muon = build_optimiser(model, optim(name="muon", learning_rate=0.1, momentum=0.0))
    assert [id(p) for p in muon.param_groups[-1]["params"]] == [id(model[1].weight), id(model[2].weight)]
    bank = model[2].weight
    bank.grad = torch.randn_like(bank)
    before, gradient = (value.detach().double().numpy().reshape(64, 16) for value in (bank, bank.grad))
    expected = before * math.sqrt(64) / np.linalg.norm(before) - 0.1 * 2 * newton_schulz(gradient)
    for group in muon.param_groups:
        group["lr"] = 0.1
    muon.step()
    assert np.abs(bank.detach().numpy().reshape(64, 16) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "overrides", "others"),
    [
        ("transformer-tiny", ["heads=2"], {"words.target.weight"}),
        ("transformer-tiny", ["tied=none"], {f"words.{one}.weight" for one in ("source", "target", "output")}),
        ("convs2s", [], {"words.target.weight", "source_positions.weight", "target_positions.weight"}),
        ("seq2seq", ["attention=additive"], {"embedding.weight", "attention.energy.weight"}),
        ("seq2seq", ["tied=none", "cell=gru"], {"embedding.weight", "source_embedding.weight", "output_weight"}),
    ],
)
def test_muon_takes_a_translators_matrices_and_adamw_the_rest(
    kind: str, overrides: list[str], others: set[str]
) -> None:
    """Liu et al. 2025: each step is the orthogonal matrix times 0.2·√(the longer side), as large as those of AdamW."""
    sizes = {
        "transformer-tiny": ["width=8", "feedforward_width=16", "encoder_layers=1", "decoder_layers=1"],
        "convs2s": ["width=8", "embedding_width=8", "encoder_layers=1", "decoder_layers=1"],
        "seq2seq": ["embedding_width=8", "encoder_width=6", "decoder_width=8"],
    }
    torch.manual_seed(1)
    recipe = resolve(kind, [f"model.{one}" for one in (*sizes[kind], *overrides)]).recipe
    model = translator(recipe.model, 20, 20)
    muon = build_optimiser(
        model, optim(name="muon", learning_rate=0.1, other_learning_rate=0.03, momentum=0.8, weight_decay=1.0)
    )
    for group in muon.param_groups:
        group["lr"] = 0.1 * group["share"]
    own = {name: value.detach().double().numpy().copy() for name, value in model.named_parameters()}
    matrices = {name for name, value in own.items() if value.ndim == 2} - others
    assert len(matrices) > 5
    rest = {
        name: value.detach().clone().requires_grad_()
        for name, value in model.named_parameters()
        if name not in matrices
    }
    adamw = torch.optim.AdamW(
        [
            {"params": [value for value in rest.values() if value.ndim > 1], "weight_decay": 1.0},
            {"params": [value for value in rest.values() if value.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.03,
        betas=(0.8, 0.98),
    )
    momentum = {name: np.zeros_like(own[name]) for name in matrices}
    for _ in range(3):
        for name, value in model.named_parameters():
            value.grad = torch.randn_like(value)
            if name in rest:
                rest[name].grad = value.grad.clone()
                continue
            gradient = value.grad.double().numpy()
            momentum[name] = 0.8 * momentum[name] + gradient
            step = newton_schulz(gradient + 0.8 * momentum[name]) * 0.2 * math.sqrt(max(gradient.shape))
            own[name] = own[name] * (1 - 0.1 * 1.0) - 0.1 * step
        muon.step()
        adamw.step()
    for name, value in model.named_parameters():
        if name in matrices:
            assert np.abs(value.detach().numpy() - own[name]).max() < 1e-4, name
        else:
            assert torch.allclose(value, rest[name], atol=1e-6), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_a_matrix_alone_gets_the_step_of_torchs_muon() -> None:
    """torch's iterates in bfloat16, hence the tolerance."""
    torch.manual_seed(1)
    ours, theirs = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    keys = {"learning_rate": 0.1, "momentum": 0.95, "weight_decay": 0.1}
    muon = build_optimiser(ours, optim(name="muon", **keys))
    published = torch.optim.Muon(
        theirs.parameters(), lr=0.1, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.weight.grad = torch.randn(16, 24)
        theirs.weight.grad = ours.weight.grad.clone()
        muon.step()
        published.step()
    assert (ours.weight - theirs.weight).abs().max() < 0.01
    assert (ours.weight - start).abs().max() > 0.05


@pytest.mark.parametrize("lacks", ["step", "exp_avg", "momentum_buffer"])
def test_what_an_optimiser_lacks_of_one_parameter_is_found_out(lacks: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    muon = build_optimiser(model, optim(name="muon"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    muon.step()
    tensors = optimiser_tensors(muon)
    restore_optimiser(build_optimiser(model, optim(name="muon")), tensors)
    key = next(name for name in tensors if name.endswith(f".{lacks}"))
    with pytest.raises(ValueError, match="more of one parameter"):
        restore_optimiser(
            build_optimiser(model, optim(name="muon")), {name: tensors[name] for name in tensors if name != key}
        )


def test_what_has_no_gradient_or_wants_none_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].weight.requires_grad_(False)
    before = [value.detach().clone() for value in model.parameters()]
    muon = build_optimiser(model, optim(name="muon"))
    muon.step()
    model[1].bias.grad = torch.ones(4)
    muon.param_groups[1]["lr"] = 1.0
    muon.step()
    same = [torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True)]
    assert same == [True, True, True, False]


@pytest.mark.parametrize("warmup", [0.1, 0.25, 0.3])
def test_one_cycle_is_torchs(warmup: float) -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2.0, total_steps=200, pct_start=warmup, cycle_momentum=False
    )
    for step in range(200):
        expected = optimiser.param_groups[0]["lr"]
        assert learning_rate(optim(schedule="one-cycle", warmup=warmup), step, 200) == pytest.approx(expected, rel=1e-9)
        optimiser.step()
        if step < 199:
            theirs.step()


def test_one_cycle_at_its_edges() -> None:
    cycle = optim(schedule="one-cycle", warmup=0.0)
    assert learning_rate(cycle, 0, 10) == 2.0
    assert learning_rate(cycle, 9, 10) == pytest.approx(2.0 / 250_000)
    assert learning_rate(cycle, 0, 1) == 2.0
    assert all(learning_rate(optim(schedule="one-cycle", warmup=0.99), step, 3) > 0 for step in range(3))


def test_steps_are_those_of_the_paper() -> None:
    """He et al. 2015, §4.2: 0.1, divided by 10 at 32,000 and 48,000 of 64,000 iterations."""
    paper = optim(schedule="step", warmup=0.0, learning_rate=0.1)
    rates = [learning_rate(paper, step, 64_000) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    other = optim(schedule="step", warmup=0.1, learning_rate=1.0, milestones=[0.3, 0.6, 0.9], factor=0.5)
    assert [learning_rate(other, step, 10) for step in range(10)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_the_inverse_square_root_is_the_papers() -> None:
    """Vaswani et al. 2017, eq. 3: d^-0.5 · min(step^-0.5, step · warmup^-1.5), of steps counted from 1."""
    width, rising, steps = 512, 4000, 100_000
    paper = optim(schedule="inverse-sqrt", warmup=rising / steps, learning_rate=(width * rising) ** -0.5)
    for step in (1, 2, 1000, 3999, 4000, 4001, 16_000, 100_000):
        expected = width**-0.5 * min(step**-0.5, step * rising**-1.5)
        assert learning_rate(paper, step - 1, steps) == pytest.approx(expected, rel=1e-12)
    assert [learning_rate(optim(schedule="inverse-sqrt", warmup=0.0), step, 10) for step in (0, 3, 8)] == pytest.approx(
        [2, 1, 2 / 3]
    )


def test_the_average_of_weights_is_exponential() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.9)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 120):
        decay = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
        model(torch.randn(8, 2))
        average.update(step)
        for name, value in model.state_dict().items():
            counts = name.endswith("num_batches_tracked")
            expected[name] = value.double() if counts else decay * expected[name] + (1 - decay) * value.double()
    assert average.weights.keys() == expected.keys()
    assert all((average.weights[name] - value).abs().max() < 1e-4 for name, value in expected.items())


def test_tied_weights_have_one_average() -> None:
    recipe = resolve("transformer-tiny").recipe
    model = translator(recipe.model.model_copy(update={"width": 8, "heads": 2}), 20, 20)
    average = WeightAverage(model, 0.9)
    words = [name for name in average.weights if name.startswith("words.") and name.endswith(".weight")]
    assert len(words) == 3
    assert len({average.weights[name].data_ptr() for name in words}) == 1
    before = average.weights[words[0]].clone()
    with torch.no_grad():
        model.get_parameter(words[0]).add_(1)
    average.update(10**6)
    torch.testing.assert_close(average.weights[words[0]], before + 0.1)


def test_weights_are_swapped_for_a_while_even_if_that_fails() -> None:
    model = nn.Linear(2, 2)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    other = {name: torch.ones_like(value) for name, value in own.items()}

    def used() -> None:
        with swapped(model, other):
            assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
            raise KeyError

    with pytest.raises(KeyError):
        used()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_what_is_validated_and_kept_is_the_average(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    recipe = resolve(str(tiny[kind]), ["training.ema_decay=0.7", "training.epochs=2"]).recipe
    task = tasks.build(recipe, runtime=CPU)
    mean = {name: value.double() for name, value in task.model.state_dict().items()}
    scores, means = [], []
    for report in fit(task, Trainer.of(task), start=Progress()):
        if report.scores is not None:
            scores.append(report.scores.score)
            means.append(mean)
            continue
        decay = min(0.7, (1 + report.progress.step) / (10 + report.progress.step))
        for name, value in task.model.state_dict().items():
            mean = {
                **mean,
                name: decay * mean[name] + (1 - decay) * value if value.is_floating_point() else value.clone(),
            }
    training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Silent())
    best = checkpoint.load(Run(tmp_path / "run").best)
    kept = means[best.progress.best_epoch - 1]
    assert all((best.weights[name] - value).abs().max() < 1e-5 for name, value in kept.items())
    again = tasks.build(recipe, runtime=CPU)
    tasks.restore(again, best)
    assert again.validate().score == pytest.approx(scores[best.progress.best_epoch - 1])
    last = checkpoint.load(Run(tmp_path / "run").last)
    assert all(torch.equal(value, task.model.state_dict()[name]) for name, value in last.weights.items())
    used = tasks.load(Run(tmp_path / "run").last, runtime=CPU)
    assert all((value - means[-1][name]).abs().max() < 1e-5 for name, value in used.model.state_dict().items())
    assert used.validate().score == pytest.approx(scores[-1])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # of ten steps the first two rise; of the other eight the first is at the top
        ("constant", [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
        ("linear", [1, 2, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 2, 2, *(1 + math.cos(math.radians(angle)) for angle in np.arange(22.5, 180, 22.5))]),
    ],
)
def test_the_rate_rises_and_falls(schedule: str, rates: list[float]) -> None:
    found = [learning_rate(optim(schedule=schedule), step, 10) for step in range(10)]
    assert found == pytest.approx(rates, abs=1e-12)
    backwards = [learning_rate(optim(schedule=schedule), step, 10) for step in reversed(range(10))]
    assert backwards[::-1] == found, "a function of the step alone"


def test_the_rate_at_the_edges() -> None:
    assert learning_rate(optim(warmup=0.0), 0, 10) == 2, "no rise"
    assert [learning_rate(optim(warmup=0.99), step, 3) for step in range(3)] == pytest.approx([2 / 3, 4 / 3, 2])
    assert learning_rate(optim(), 0, 1) == 2, "a single step"
    for schedule in ("linear", "cosine"):
        assert 0 < learning_rate(optim(schedule=schedule), 9999, 10_000) < 1e-3, "it ends beside zero"


def test_weight_decay_spares_vectors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.Embedding(5, 2))
    for name in ("sgd", "adamw"):
        before = {key: value.clone() for key, value in model.named_parameters()}
        optimiser = build_optimiser(model, optim(name=name, learning_rate=0.5, weight_decay=0.1, momentum=0.0))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        for key, value in model.named_parameters():
            factor = 0.95 if value.ndim > 1 else 1
            assert torch.allclose(value, factor * before[key]), (name, key)


def trajectory(name: str, changes: dict[str, float]) -> list[float]:
    """A weight from 1 on after each of five steps down the slope of sin."""
    weight = nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
    module = nn.Module()
    module.register_parameter("weight", weight)
    optimiser = build_optimiser(module, optim(name=name, learning_rate=0.1, **changes))
    places = []
    for _ in range(5):
        weight.grad = weight.detach().cos()
        optimiser.step()
        places.append(weight.item())
    return places


def test_sgd_is_with_nesterov_momentum() -> None:
    for momentum in (0.9, 0.0):
        weight, speed, places = 1.0, 0.0, []
        for _ in range(5):
            gradient = math.cos(weight) + 0.01 * weight
            speed = momentum * speed + gradient
            weight -= 0.1 * (gradient + momentum * speed)
            places.append(weight)
        assert trajectory("sgd", {"momentum": momentum, "weight_decay": 0.01}) == pytest.approx(places, rel=1e-12)


def test_adamw_is_with_decoupled_decay() -> None:
    weight, first, second, places = 1.0, 0.0, 0.0, []
    for step in range(1, 6):
        gradient = math.cos(weight)
        weight -= 0.1 * 0.01 * weight
        first = 0.9 * first + 0.1 * gradient
        second = 0.98 * second + 0.02 * gradient**2
        weight -= 0.1 * first / (1 - 0.9**step) / (math.sqrt(second / (1 - 0.98**step)) + 1e-8)
        places.append(weight)
    assert trajectory("adamw", {"momentum": 0.9, "weight_decay": 0.01}) == pytest.approx(places, rel=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimisers_tensors_go_where_the_parameters_are(name: str) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimiser = build_optimiser(model, optim(name=name))
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimiser.step()
    tensors = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in optimiser_tensors(optimiser).items()
    }
    assert {key.split(".")[2] for key in tensors} == (
        {"momentum_buffer"} if name == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
    )
    for device in ("cpu", "meta"):
        other = nn.Conv2d(3, 4, 3, device=device).to(memory_format=torch.channels_last)
        follower = torch.optim.AdamW([other.weight, other.bias])
        restore_optimiser(follower, {**tensors, "random.cpu": torch.zeros(1)})
        for parameter in other.parameters():
            assert follower.state[parameter].keys() == {key.split(".")[2] for key in tensors}
            for value in follower.state[parameter].values():
                assert value.device.type == device
                assert value.ndim == 0 or value.stride() == parameter.stride()
