"""Subwords: what goes in comes out, the same text gives the same vocabulary, special ids are fixed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dl7cli.data.vocabulary import BOS, EOS, PAD, UNKNOWN, Vocabulary
from dl7cli.errors import UserError

LINES = [
    "Ein Mann mit einem grünen Hut, der über die Straße läuft.",
    "A man in a green hat is running across the street.",
    "Zwei Hunde spielen im Schnee.",
    "Two dogs play in the snow!",
] * 5
LETTERS = sorted({letter for line in LINES for letter in line})


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(LINES, 120)


@given(text=st.text(alphabet=LETTERS, max_size=60))
def test_known_letters_come_back_exactly_spaces_included(vocabulary: Vocabulary, text: str) -> None:
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(text=st.text(max_size=60))
def test_any_text_is_encoded_to_known_ids_without_specials(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert all(0 < one < len(vocabulary) for one in ids)
    assert not {PAD, BOS, EOS} & set(ids)


def test_many_lines_at_once_are_the_lines_one_by_one(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode_all(LINES) == [vocabulary.encode(line) for line in LINES]


def test_the_same_lines_give_the_same_vocabulary_and_json_gives_it_back(vocabulary: Vocabulary) -> None:
    again = Vocabulary.train(iter(LINES), 120)
    assert again.to_json() == vocabulary.to_json()
    back = Vocabulary.from_json(vocabulary.to_json())
    assert back.encode_all(LINES) == vocabulary.encode_all(LINES)
    assert len(back) == len(vocabulary) <= 120


def test_special_ids_leave_no_text_and_an_unknown_letter_is_the_unknown_id(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("Hut")
    assert vocabulary.decode([BOS, *ids, EOS, PAD]) == "Hut"
    assert UNKNOWN in vocabulary.encode("漢")


def test_a_small_text_gives_a_small_vocabulary() -> None:
    assert len(Vocabulary.train(["ab ab", "ba a"], 1000)) < 30


@pytest.mark.parametrize(("lines", "size"), [(["abcdefgh 12345"], 8), ([], 100)])
def test_a_vocabulary_that_cannot_be_learnt_is_an_error(lines: list[str], size: int) -> None:
    with pytest.raises(UserError, match="no vocabulary"):
        Vocabulary.train(lines, size)
