"""Sentence pairs: one set of sentences in every layout, and what is said of bad data."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dl7cli.data.pairs import Pairs, digest, read_pairs
from dl7cli.errors import UserError

Split = list[tuple[str, str]]

# The second line would be three, were it split where `str.splitlines` does.
ENGLISH = {
    "train": ["A dog runs.", "Two\u2028men\x85and \x0ca\x0bcat\x1c sit.", 'He says "no".'],
    "validation": ["Yes."],
    "test": ["Good morning.", "Good night."],
}
GERMAN = {
    "train": ["Ein Hund läuft.", "Zwei Männer und eine Katze sitzen.", "Er sagt „nein“."],
    "validation": ["Ja."],
    "test": ["Guten Morgen.", "Gute Nacht."],
}
EXPECTED = {split: list(zip(ENGLISH[split], GERMAN[split], strict=True)) for split in ENGLISH}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_parallel(folder: Path, split: str, name: str) -> None:
    write(folder / f"{name}.en", "\n".join(ENGLISH[split]) + "\n")
    write(folder / f"{name}.de", "\n".join(GERMAN[split]))


def write_tabbed(folder: Path, split: str, name: str) -> None:
    write(folder / f"{name}.tsv", "".join(f"{en}\t{de}\n" for en, de in EXPECTED[split]))


def write_headed(folder: Path, split: str, name: str) -> None:
    write(folder / f"{name}.tsv", "de\ten\r\n" + "".join(f"{de}\t{en}\r\n" for en, de in EXPECTED[split]))


def write_json(folder: Path, split: str, name: str) -> None:
    rows = (json.dumps({"id": 3, "de": de, "en": en}, ensure_ascii=False) for en, de in EXPECTED[split])
    write(folder / f"{name}.jsonl", "\ufeff" + "\n".join(rows) + "\n\n")


def write_nested_json(folder: Path, split: str, name: str) -> None:
    rows = (json.dumps({"translation": {"de": de, "en": en}}) for en, de in EXPECTED[split])
    write(folder / f"{name}.jsonl", "\n".join(rows))


def to_parquet(path: Path, columns: dict[str, list[Any]], features: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None).to_parquet(path)
    return path


def write_flat_parquet(folder: Path, split: str, name: str) -> None:
    to_parquet(folder / f"{name}-00000-of-00001.parquet", {"en": ENGLISH[split], "de": GERMAN[split]})


def write_nested_parquet(folder: Path, split: str, name: str) -> None:
    rows = [{"en": en, "de": de} for en, de in EXPECTED[split]]
    features = {"translation": datasets.Translation(languages=["de", "en"])}
    to_parquet(folder / f"{name}-00000-of-00001.parquet", {"translation": rows}, features)


def write_struct_parquet(folder: Path, split: str, name: str) -> None:
    rows = [{"en": en, "de": de} for en, de in EXPECTED[split]]
    to_parquet(folder / f"{name}-00000-of-00001.parquet", {"id": list(range(len(rows))), "translation": rows})


LAYOUTS = [
    write_parallel,
    write_tabbed,
    write_headed,
    write_json,
    write_nested_json,
    write_flat_parquet,
    write_nested_parquet,
    write_struct_parquet,
]


def read(source: Path | str, languages: tuple[str, str] = ("en", "de"), **options: Any) -> Pairs:
    return read_pairs(str(source), source_language=languages[0], target_language=languages[1], **options)


@pytest.mark.parametrize(
    ("layout", "validation"),
    [
        *((layout, "validation") for layout in LAYOUTS),
        *((write_json, name) for name in ("val", "valid")),
        *((write_tabbed, name) for name in ("dev", "val")),
        *((write_parallel, name) for name in ("val", "valid", "dev")),
    ],
)
def test_every_layout_gives_the_same_pairs_in_both_directions(
    tmp_path: Path, layout: Callable[[Path, str, str], None], validation: str
) -> None:
    for split in EXPECTED:
        layout(tmp_path / "set", split, validation if split == "validation" else split)
    forwards = read(tmp_path / "set")
    assert forwards == Pairs(EXPECTED, "en", "de", ())
    backwards = {split: [(de, en) for en, de in pairs] for split, pairs in EXPECTED.items()}
    if layout is write_tabbed:  # without a header the first column is the source, whatever its language
        backwards = EXPECTED
    assert read(tmp_path / "set", ("de", "en")).splits == backwards


@pytest.mark.parametrize("layout", [write_tabbed, write_headed, write_json, write_nested_json, write_flat_parquet])
def test_a_single_file_is_the_training_split(tmp_path: Path, layout: Callable[[Path, str, str], None]) -> None:
    layout(tmp_path, "train", "some")
    (file,) = tmp_path.iterdir()
    assert read(file).splits == {"train": EXPECTED["train"]}


def test_a_readme_may_name_the_files(tmp_path: Path) -> None:
    write_json(tmp_path, "train", "part-one")
    write(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part-one.jsonl\n---\n",
    )
    (tmp_path / "part-one.jsonl").write_text(
        "\n".join(json.dumps({"en": en, "de": de}) for en, de in EXPECTED["train"]), encoding="utf-8"
    )
    assert read(tmp_path).splits == {"train": EXPECTED["train"]}


@given(
    st.lists(
        st.tuples(
            *[st.text(st.characters(exclude_characters="\n\t\r", exclude_categories=["Cs"]), min_size=1)] * 2
        ).filter(
            lambda pair: all(it.strip("\ufeff").strip() for it in pair) and set(map(str.strip, pair)) != {"en", "de"}
        ),
        min_size=1,
    )
)
def test_any_text_comes_back_from_every_text_layout(pairs: Split) -> None:
    stripped = [(en.strip(), de.strip()) for en, de in pairs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A byte order mark in front, since one at the start of a text belongs to the file.
        write(folder / "a" / "train.en", "\ufeff" + "".join(f"{en}\n" for en, _ in pairs))
        write(folder / "a" / "train.de", "\ufeff" + "".join(f"{de}\n" for _, de in pairs))
        write(folder / "b" / "train.tsv", "\ufeff" + "".join(f"{en}\t{de}\n" for en, de in pairs))
        rows = (json.dumps({"en": en, "de": de}, ensure_ascii=False) + "\n" for en, de in pairs)
        write(folder / "c" / "train.jsonl", "".join(rows))
        for layout in ("a", "b", "c"):
            assert read(folder / layout).splits == {"train": stripped}


def test_pairs_with_an_empty_side_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.en", "one\n\nthree\n \nfive\n")
    write(tmp_path / "a" / "train.de", "eins\nzwei\n\n\t\nfünf\n")
    write(tmp_path / "b" / "train.tsv", "one\teins\n\tzwei\nthree\t\n\nfive\tfünf\n")
    for folder in ("a", "b"):
        found = read(tmp_path / folder)
        assert found.splits == {"train": [("one", "eins"), ("five", "fünf")]}
        assert found.notes == ("3 of 5 pairs of the train split left out: a side is empty",)


@pytest.mark.parametrize("write_test", [write_parallel, write_tabbed, write_json])
def test_a_test_set_of_another_name_serves_if_it_is_the_only_one(
    tmp_path: Path, write_test: Callable[[Path, str, str], None]
) -> None:
    write_test(tmp_path, "train", "train")
    write_test(tmp_path, "test", "test_2016")
    found = read(tmp_path)
    assert found.splits["test"] == EXPECTED["test"]
    assert found.notes == ("the test split is `test_2016`",)
    write_test(tmp_path, "test", "test_2017")
    found = read(tmp_path)
    assert list(found.splits) == ["train"]
    assert found.notes == ("no test split: none of `test_2016`, `test_2017` is called `test`",)
    write_test(tmp_path, "test", "test")
    assert read(tmp_path).splits == {split: EXPECTED[split] for split in ("train", "test")}
    assert read(tmp_path).notes == ()


def test_of_two_kinds_of_files_those_with_most_splits_are_read_and_the_others_named(tmp_path: Path) -> None:
    for split in EXPECTED:
        write_parallel(tmp_path, split, split)
    write(tmp_path / "train.tsv", "pasted\tzusammengefügt\n")
    assert read(tmp_path) == Pairs(EXPECTED, "en", "de", ("not read, as there are `*.en`: `train.tsv`",))
    write_json(tmp_path / "other", "train", "train")
    write(tmp_path / "other" / "test_2016.tsv", "one\teins\n")
    found = read(tmp_path / "other")
    assert found.splits == {"train": EXPECTED["train"]}
    assert found.notes == ("not read, as there are `*.jsonl`: `test_2016.tsv`",)


@pytest.mark.parametrize(("name", "for_training"), [("train", True), ("test", False)])
def test_a_split_that_is_there_twice_is_refused(name: str, for_training: bool, tmp_path: Path) -> None:
    """Such as references, and beside them what a model made of the same sources."""
    write_parallel(tmp_path, "train", name)
    write_tabbed(tmp_path, "test", name)
    with pytest.raises(UserError, match=rf"has its {name} split twice: `{name}\.tsv` and `{name}\.en`") as refused:
        read(tmp_path, for_training=for_training)
    assert refused.value.hint == "move one of them away"


@pytest.mark.parametrize("header", ["en\tde", "EN\tDE", "De\tEn"])
def test_a_header_may_be_in_capitals(header: str, tmp_path: Path) -> None:
    rows = [("one", "eins"), ("two", "zwei")]
    turned = header.lower().startswith("de")
    lines = ["\t".join(reversed(row) if turned else row) for row in rows]
    write(tmp_path / "some.tsv", "\n".join([header, *lines]) + "\n")
    assert read(tmp_path / "some.tsv").splits == {"train": rows}
    assert read(tmp_path / "some.tsv", ("de", "en")).splits == {"train": [(de, en) for en, de in rows]}


def test_text_of_a_table_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    latin = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"en": latin, "de": ["Kaffee"]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"split `train` of `.*` has text that is not UTF-8: byte 0xe9"):
        read(tmp_path / "train.parquet")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    write_parallel(tmp_path, "train", "train")
    reported: list[tuple[str, int, int]] = []
    read(tmp_path, progress=lambda *it: reported.append(it))
    size = (tmp_path / "train.en").stat().st_size
    assert ("reading train.en", size, size) in reported


GOOD = '{"en": "a", "de": "b"}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.en": "a\nb\n", "train.de": "c\n"}, r"`.*train\.en` has 2 lines but `.*train\.de` has 1"),
        ({"train.en": b"a\nb\xff\n", "train.de": "c\nd\n"}, r"`.*train\.en` line 2 is not UTF-8 \(byte 0xff\)"),
        ({"train.en": "", "train.de": "c\n"}, r"`.*train\.en` is empty"),
        ({"train.en": "a\n", "train.fr": "c\n"}, r"`.*train\.\*` has no `de`: there is `en`, `fr`"),
        ({"train.fr": "a\n", "train.cs": "c\n"}, r"`.*train\.\*` has no `en`: there is `cs`, `fr`"),
        (
            {"train.en": "a\n", "train.de": "c\n", "val.en": "x\n"},
            r"`.*val\.de` is missing beside `.*val\.en`",
        ),
        (
            {"train.en": "a\n", "train.de": "c\n", "val.en": "x\n", "val.de": "x\n", "dev.en": "x\n", "dev.de": "x\n"},
            "has both `dev` and `val` for its validation split",
        ),
        ({"test.en": "a\n", "test.de": "c\n"}, r"has no train split: there is `test\.de`, `test\.en`"),
        ({"train.en": " \n", "train.de": "c\n"}, "the train split of `.*` has no sentence pairs"),
        ({"train.tsv": "a\tb\nc\n"}, r"`.*train\.tsv` line 2 has 1 column and not 2"),
        ({"train.tsv": "a\tb\nc\td\ne\tf\tg\n"}, r"`.*train\.tsv` line 3 has 3 columns and not 2"),
        ({"train.tsv": "en\tfr\na\tb\n"}, r"`.*train\.tsv` has no `de`: there is `en`, `fr`"),
        ({"train.tsv": b"a\tb\n\xe4\tb\n"}, r"`.*train\.tsv` line 2 is not UTF-8"),
        ({"train.jsonl": GOOD + "{'en': 1}\n"}, r"`.*train\.jsonl` line 2 is not JSON: Expecting property name"),
        ({"train.jsonl": GOOD + "[" * 100_000}, r"`.*train\.jsonl` line 2 is not JSON"),
        ({"train.jsonl": GOOD + '["a", "b"]\n'}, r"`.*train\.jsonl` line 2 is not a JSON object"),
        ({"train.jsonl": GOOD + '\n{"en": "a"}\n'}, r"`.*train\.jsonl` line 3 has no `de`: there is `en`"),
        ({"train.jsonl": '{"en": "a", "fr": "b"}\n'}, r"`.*train\.jsonl` has no `de`: there is `en`, `fr`"),
        ({"train.jsonl": '{"translation": {"fr": "a"}}\n'}, r"`.*train\.jsonl` has no `en`: there is `fr`"),
        ({"train.jsonl": GOOD + '{"en": "a", "de": 7}\n'}, r"`.*train\.jsonl` line 2: `de` is 7 and not a string"),
        ({"train.jsonl": GOOD + '{"en": null, "de": "b"}\n'}, r"`.*train\.jsonl` line 2: `en` is null and not"),
        ({"train.jsonl": GOOD + '{"en": "\\ud800", "de": "b"}\n'}, r"`.*train\.jsonl` line 2: `en` has half a char"),
        ({"train.jsonl": GOOD, "val.jsonl": "nonsense\n"}, r"`.*val\.jsonl` line 1 is not JSON"),
        ({"train.jsonl": GOOD, "val.jsonl": ""}, r"`.*val\.jsonl` is empty"),
        ({"val.jsonl": GOOD}, "has no train split"),
        ({"notes.doc": "x"}, r"has no train split: there is `notes\.doc`"),
        ({"train/cat/1.png": "x"}, "holds no sentence pairs that can be read"),
    ],
)
def test_bad_files_are_named_with_line(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / "set" / name, content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "set")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"en": ["a", "b"], "de": ["c", None]}, "row 2 of split `train` of `.*set`: `de` is null and not a string"),
        ({"en": ["a", "b"], "de": [1, 2]}, "row 1 of split `train` of `.*set`: `de` is 1 and not a string"),
        ({"en": ["a"], "fr": ["b"]}, "`.*set` has no `de`: there is `en`, `fr`"),
        ({"translation": [{"en": "a", "fr": "b"}]}, r"`.*set \(translation\)` has no `de`: there is `en`, `fr`"),
        ({"source": ["a"], "translation": ["b"]}, "`.*set` has no `en`: there is `source`, `translation`"),
        ({"translation": [{"en": "a", "de": "b"}, None]}, "row 2 of split `train` of `.*set`: `translation` is null"),
    ],
)
def test_bad_rows_of_tables_are_named(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    to_parquet(tmp_path / "set" / "train.parquet", columns)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "set")


def test_words_that_pandas_takes_for_missing_are_words(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "en,de\nNA,null\nnone,keine\n,leer\n")
    found = read(tmp_path)
    assert found.splits == {"train": [("NA", "null"), ("none", "keine")]}
    assert found.notes == ("1 of 3 pairs of the train split left out: a side is empty",)


def test_sources_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match=r"there is no file or folder `~nobody-of-that-name/x\.tsv`"):
        read("~nobody-of-that-name/x.tsv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder `.*empty` is empty"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"`.*x\.doc` is not a kind of file"):
        read(write(tmp_path / "x.doc", "x"))
    for nothing in ("", ":x"):
        with pytest.raises(UserError, match="the data source is empty"):
            read(nothing)
    with pytest.raises(UserError, match="source and target language are both `en`"):
        read("builtin:phrases", ("en", "en"))
    with pytest.raises(UserError, match="`builtin:phrases` has no `fr`: there is `en`, `de`"):
        read("builtin:phrases", ("fr", "de"))
    with pytest.raises(UserError, match="no built-in sentence pairs `builtin:shapes`"):
        read("builtin:shapes")


def test_a_name_that_is_a_pattern_is_not_that_of_other_files(tmp_path: Path) -> None:
    write(tmp_path / "v2" / "train.csv", "en,de\na,b\n")
    write(tmp_path / "v[2]" / "train.csv", "en,de\nc,d\n")
    with pytest.raises(UserError, match=r"`.*/v\[2\]` cannot be read with `\[` in its name"):
        read(tmp_path / "v[2]")
    write(tmp_path / "v[2]" / "train.tsv", "c\td\n")
    assert read(tmp_path / "v[2]").splits == {"train": [("c", "d")]}, "what needs no `datasets` is read"


def test_a_configuration_of_what_has_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.tsv", "a\tb\n")
    to_parquet(tmp_path / "table.parquet", {"en": ["a"], "de": ["b"]})
    for source in ("set", "set/train.tsv", "table.parquet"):
        assert read(tmp_path / source).splits == {"train": [("a", "b")]}
        with pytest.raises(UserError, match=r"` has no configurations: `:fr-en` means nothing"):
            read(f"{tmp_path / source}:fr-en")


def test_a_folder_that_may_not_be_looked_into_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, who may look into all, it is pretended."""
    write(tmp_path / "set" / "train.tsv", "a\tb\n")
    (tmp_path / "set").chmod(0o644)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"`.*set` cannot be read: Permission denied"):
        read(tmp_path / "set")


def test_a_file_that_cannot_be_looked_at_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a link into a folder that one may not enter; as root, who may, it is pretended."""
    write(tmp_path / "set" / "train.tsv", "a\tb\n")

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", lambda path: refuse(path) if path.suffix == ".tsv" else os.path.isfile(path))
    with pytest.raises(UserError, match=r"`.*train\.tsv` cannot be read: Permission denied"):
        read(tmp_path / "set")


def test_the_built_in_pairs_have_two_directions() -> None:
    forwards, backwards = read("builtin:phrases"), read("builtin:phrases", ("de", "en"))
    assert list(forwards.splits) == ["train", "validation", "test"]
    for split, pairs in forwards.splits.items():
        assert backwards.splits[split] == [(de, en) for en, de in pairs]


def test_text_is_read_without_importing_datasets(tmp_path: Path) -> None:
    write_json(tmp_path, "train", "train")
    code = f"""
import sys
from dl7cli.data.pairs import read_pairs
read_pairs({str(tmp_path)!r}, source_language="en", target_language="de")
print({{"datasets", "pandas", "numpy", "torch"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_multi30k_as_published(real_data: Callable[[str], Path]) -> None:
    folder = real_data("multi30k")
    found = read(folder)
    assert {split: len(pairs) for split, pairs in found.splits.items()} == {
        "train": 29_000,
        "validation": 1014,
        "test": 1000,
    }
    assert found.notes == ()
    assert found.splits["test"][0] == (
        "A man in an orange hat starring at something.",
        "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.",
    )
    # Against the reading of `datasets`.
    table = datasets.load_dataset("json", data_files=str(folder / "val.jsonl"), split="train")
    assert [(row["en"].strip(), row["de"].strip()) for row in table] == found.splits["validation"]
    assert digest(found.splits["test"]).startswith("82e312a82e29"), "as README says"
