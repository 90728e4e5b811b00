"""What every test shares: one thread, caches of its own, and the conditions under which a test is skipped."""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Read when torch, datasets and huggingface_hub are first imported, which is after this file; commands that
# tests start inherit it. Several threads per process are far slower than one where processes compete for
# cores, and what lies in a developer's caches must not decide what a test sees.
# Nor must a mirror, a proxy, or a launcher that the tests are started by.
for _name in list(os.environ):
    if _name.startswith(("HF_", "SLURM_", "TORCHELASTIC_", "DL7_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUBLAS_WORKSPACE_CONFIG"):
    os.environ.pop(_name, None)
_caches = tempfile.TemporaryDirectory(prefix="dl7-tests-")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DL7_CACHE"] = str(Path(_caches.name, "dl7"))
os.environ["HF_HOME"] = str(Path(_caches.name, "huggingface"))

settings.register_profile("dl7", deadline=None)  # a busy machine is no failure
settings.load_profile("dl7")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device, those marked `bf16` where the CPU lacks that."""
    marked = {name: [item for item in items if item.get_closest_marker(name)] for name in ("gpu", "bf16")}
    if not any(marked.values()):
        return
    import torch

    from dl7cli.device import precisions

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device, and torch sees none"
    if "bf16" not in precisions(torch.device("cpu")):
        missing["bf16"] = "needs a CPU that computes in bf16"
    for name, reason in missing.items():
        for item in marked[name]:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data("cifar10")` is the folder of a published set; without a copy of it the test is skipped."""

    def find(name: str) -> Path:
        folder = Path(__file__).parents[2] / "shared" / "data" / name
        if not folder.exists():
            pytest.skip(f"needs the real `{name}`, which is not at ../shared/data/{name}")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe files by kind of model, `resnet` and `seq2seq`: three epochs of a few steps on data that lies beside them.

    A checkpoint is written after every step.
    """
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    for split, count in (("train", 26), ("validation", 7), ("test", 7)):
        for number in range(count):
            pixels = random.integers(0, 128, (8, 8, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 60
            file = folder / "images" / split / ("red", "green", "blue")[number % 3] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    (folder / "pairs").mkdir()
    for split, count in (("train", 40), ("validation", 5), ("test", 6)):
        lines = [" ".join(map(str, random.integers(0, 10, random.integers(4, 8)))) for _ in range(count)]
        (folder / "pairs" / f"{split}.en").write_text("".join(f"{line}\n" for line in lines))
        (folder / "pairs" / f"{split}.de").write_text("".join(f"{line[::-1]}\n" for line in lines))
    images, pairs = folder / "resnet.toml", folder / "seq2seq.toml"
    images.write_text(f"""
        data = {{ source = '{folder / "images"}', crop_padding = 1 }}
        model = {{ kind = "resnet", depth = 8 }}
        training = {{ epochs = 3, batch_size = 8, checkpoint_minutes = 1e-9 }}
        optim = {{ name = "sgd", learning_rate = 0.05, weight_decay = 1e-3, schedule = "linear", warmup = 0.2 }}
    """)
    pairs.write_text(f"""
        data = {{ source = '{folder / "pairs"}', vocabulary_size = 32 }}
        model = {{ kind = "seq2seq", embedding_width = 8, encoder_width = 8, decoder_width = 8, dropout = 0.2 }}
        training = {{ epochs = 3, batch_tokens = 60, label_smoothing = 0.1, checkpoint_minutes = 1e-9 }}
        optim = {{ name = "adamw", learning_rate = 0.02, weight_decay = 0.01, clip_norm = 0.5 }}
        decoding = {{ beam = 2 }}
    """)
    return {"resnet": images, "seq2seq": pairs}


@pytest.fixture(scope="session")
def whole(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`whole(kind, *overrides)` is a run of a tiny recipe that was never stopped."""
    from running import Silent
    from stopping import CPU

    from dl7cli import training
    from dl7cli.recipe import resolve
    from dl7cli.runs import Run

    made: dict[tuple[str, ...], Run] = {}

    def make(*recipe: str) -> Run:
        if recipe not in made:
            kind, *overrides = recipe
            folder = tmp_path_factory.mktemp("whole") / kind
            training.train(resolve(str(tiny[kind]), overrides).recipe, out=folder, runtime=CPU, listener=Silent())
            made[recipe] = Run(folder)
        return made[recipe]

    return make


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners are told of every step."""
    from dl7cli.training import session

    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Path]) -> Path:
    """A folder with the runs `resnet` and `seq2seq`, each of one epoch, which a test may read and copy."""
    from running import succeed

    folder = tmp_path_factory.mktemp("runs")
    short = ("--set", "training.epochs=1", "--set", "training.keep_last=1")
    for kind, recipe in tiny.items():
        succeed("train", str(recipe), *short, "--out", kind, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, trained by two workers without a fault; with dropout, of which each has its own."""
    from launching import LONGER, WORKERS, together

    folder = tmp_path_factory.mktemp("undisturbed")
    together("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run", cwd=folder)
    return folder / "run"


@pytest.fixture
def build(tiny: dict[str, Path]) -> Callable[..., Any]:
    """`build(kind, *overrides)` is the task of a tiny recipe."""
    import torch

    from dl7cli import tasks
    from dl7cli.device import Runtime
    from dl7cli.recipe import resolve

    runtime = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")

    def make(kind: str, *overrides: str, seed: int | None = None) -> tasks.Task:
        return tasks.build(resolve(str(tiny[kind]), overrides, seed=seed).recipe, runtime=runtime)

    return make


WORDS = {"red": "rot", "blue": "blau", "big": "groß", "small": "klein", "old": "alt", "new": "neu"}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy-two sentence pairs that are translated word by word; the other splits are some of them."""
    folder = tmp_path_factory.mktemp("pairs")
    sentences = [" ".join(words) for words in list(itertools.permutations(WORDS, 4))[::6]] + [*WORDS] * 2
    for split, chosen in (("train", sentences), ("validation", sentences[:12]), ("test", sentences[:6])):
        translated = [" ".join(WORDS[word] for word in sentence.split()) for sentence in chosen]
        (folder / f"{split}.en").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
        (folder / f"{split}.de").write_text("".join(f"{line}\n" for line in translated), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def translator(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    """A folder with `runs/seq2seq-1`, which has learnt those pairs."""
    from running import TINY_SEQ2SEQ, succeed

    work = tmp_path_factory.mktemp("translator")
    succeed("train", "seq2seq", "--data", str(pairs), *TINY_SEQ2SEQ, "--set", "training.epochs=24", cwd=work)
    return work


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def limited() -> Iterator[Callable[..., Any]]:
    """Runs commands in one process that has little memory, see `hostile`."""
    import hostile

    with hostile.limited() as run:
        yield run


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A folder that `confined` runs commands in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def confined(limited: Callable[..., Any], watched: Path) -> Callable[..., Any]:
    """Runs commands with little memory in the folder `watched`, beside which nothing may change."""
    import hostile

    return hostile.confined(limited, watched)
