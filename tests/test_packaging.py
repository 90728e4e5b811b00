"""What is installed: the files in the wheel, what it requires and the versions that are pinned."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from running import ENVIRONMENT

import dl7cli
from dl7cli import recipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(requirement: str) -> str:
    """The name in `Tomli_W >=1; …` as package indexes compare it: `tomli-w`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pinned}


def build(kind: str, source: Path, target: Path) -> Path:
    """Build the `wheel` or `sdist` of the tree at `source` into the empty folder `target`."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (built,) = target.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_recipes_folder_is_found():
    assert recipe.folder() == ROOT / "recipes"
    assert {"resnet", "seq2seq"} <= set(recipe.shipped())


def test_the_wheel_holds_every_recipe_and_module_and_nothing_else(wheel: Path):
    recipes = {f"dl7cli/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.toml")}
    files = [path for path in (ROOT / "dl7cli").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    package = {path.relative_to(ROOT).as_posix() for path in files}
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert recipes
    assert held == recipes | package


def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    for name in ("sdist", "tree", "wheel"):
        (tmp_path / name).mkdir()
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    assert contents(build("wheel", tree, tmp_path / "wheel")) == contents(wheel)


def test_the_version_is_that_of_the_package(wheel: Path):
    assert wheel.name == f"dl7-{dl7cli.__version__}-py3-none-any.whl"


def test_what_is_imported_is_what_is_required():
    """A package that only comes with another one is missing on the day that one drops it."""
    imported = set()
    for path in (ROOT / "dl7cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    needed = {canonical(name) for module in imported for name in distributions.get(module, [])} - {"dl7"}
    assert needed == {canonical(requirement) for requirement in PROJECT["dependencies"]}


def test_every_requirement_is_pinned():
    extras = PROJECT["optional-dependencies"].values()
    required = {canonical(text) for texts in [PROJECT["dependencies"], *extras] for text in texts}
    assert not required - pins().keys()


def test_torch_is_pinned_to_one_release_of_any_build():
    assert pins()["torch"] == "2.13.0"


def test_pins_are_exact():
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values()), pins()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent / "benchmarks").glob("*.py")), ids=lambda file: file.stem
)
def test_a_benchmark_still_begins(file: Path) -> None:
    """What it imports of dl7 is still there. `alternating` is what others share."""
    if "sacremoses" in file.read_text(encoding="utf-8"):
        pytest.importorskip("sacremoses")
    command = [sys.executable, str(file), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout or file.stem == "alternating"
