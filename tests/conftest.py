"""What every test shares: one thread, caches of its own, and the conditions under which a test is skipped."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Read when torch, datasets and huggingface_hub are first imported, which is after this file; commands that
# tests start inherit it. Several threads per process are far slower than one where processes compete for
# cores, and what lies in a developer's caches must not decide what a test sees.
_caches = tempfile.TemporaryDirectory(prefix="dl7-tests-")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DL7_CACHE"] = str(Path(_caches.name, "dl7"))
os.environ["HF_HOME"] = str(Path(_caches.name, "huggingface"))

settings.register_profile("dl7", deadline=None)  # a busy machine is no failure
settings.load_profile("dl7")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data("cifar10")` is the folder of a published set; without a copy of it the test is skipped."""

    def find(name: str) -> Path:
        folder = Path(__file__).parents[2] / "shared" / "data" / name
        if not folder.exists():
            pytest.skip(f"needs the real `{name}`, which is not at ../shared/data/{name}")
        return folder

    return find
