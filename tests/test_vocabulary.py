"""Vocabularies: what goes in comes out, the same text gives the same vocabulary, special ids are fixed."""

import base64
import io
import json
import unicodedata
from collections import Counter

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dl7cli.data.vocabulary import BOS, EOS, PAD, SPECIALS, UNKNOWN, Vocabulary
from dl7cli.errors import UserError

LINES = [
    "Ein Mann mit einem grünen Hut, der über die Straße läuft.",
    "A man in a green hat is running across the street.",
    "Zwei Hunde spielen im Schnee.",
    "Two dogs play in the snow!",
] * 5
LETTERS = sorted({letter for line in LINES for letter in line})
KINDS = ("bpe", "unigram", "word", "character")
SUBWORDS = ("bpe", "unigram")
LEARNT = {kind: Vocabulary.train(LINES, 120, kind) for kind in KINDS}
WHOLE = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@pytest.fixture(scope="module", params=KINDS)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return LEARNT[request.param]


@pytest.mark.parametrize("kind", [*SUBWORDS, "character"])
@given(text=st.text(alphabet=LETTERS, max_size=60))
def test_known_letters_come_back_exactly_spaces_included(kind: str, text: str) -> None:
    vocabulary = LEARNT[kind]
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(text=st.text(max_size=60))
def test_any_text_is_encoded_to_known_ids_without_specials(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert all(0 < one < len(vocabulary) for one in ids)
    assert not {PAD, BOS, EOS} & set(ids)


@pytest.mark.parametrize("kind", ["word", "character"])
@given(text=WHOLE)
def test_words_and_characters_of_a_text_make_it_up_again(kind: str, text: str) -> None:
    vocabulary = Vocabulary.train([text], 1000, kind)
    ids = vocabulary.encode(text)
    assert UNKNOWN not in ids
    assert vocabulary.decode(ids) == text


@pytest.mark.parametrize("kind", SUBWORDS)
@settings(max_examples=40)
@given(text=WHOLE)
def test_subwords_of_a_text_make_it_up_again_but_for_the_marks_of_sentencepiece(kind: str, text: str) -> None:
    reserved = str.maketrans({"▁": " ", "▅": "", "\0": "", "\x1f": "", "\n": "", "\r": ""})  # a line has no end in it
    text = text.translate(reserved)
    if text:
        vocabulary = Vocabulary.train([text], 1000, kind)
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_many_lines_at_once_are_the_lines_one_by_one(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode_all(LINES) == [vocabulary.encode(line) for line in LINES]
    assert vocabulary.encode_all([]) == []
    assert vocabulary.encode("") == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_lines_give_the_same_vocabulary_and_json_gives_it_back(kind: str) -> None:
    one, again = (Vocabulary.train(lines, 120, kind) for lines in (LINES, iter(LINES)))
    assert again.to_json() == one.to_json()
    back = Vocabulary.from_json(json.loads(json.dumps(one.to_json())))
    assert back.encode_all(LINES) == one.encode_all(LINES)
    assert back.decode(back.encode(LINES[0])) == one.decode(one.encode(LINES[0]))
    assert len(back) == len(one) <= 120


def test_special_ids_leave_no_text_and_an_unknown_letter_is_the_unknown_id(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("Hut")
    if UNKNOWN not in ids:  # it has a comma behind it in the text, and is a word all the same
        assert vocabulary.decode([BOS, *ids, EOS, PAD]) == "Hut"
    assert UNKNOWN in vocabulary.encode("漢")
    assert "�" in vocabulary.decode(vocabulary.encode("漢"))
    assert vocabulary.pieces([PAD, UNKNOWN, BOS, EOS]) == list(SPECIALS)


def test_pieces_joined_are_the_text(vocabulary: Vocabulary) -> None:
    for line in LINES:
        joined = "".join(vocabulary.pieces(vocabulary.encode(line))).replace("▁", " ")
        assert joined.removeprefix(" ") == line


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_text_gives_a_small_vocabulary(kind: str) -> None:
    assert len(Vocabulary.train(["ab ab", "ba a"], 1000, kind)) < 30
    repeated = Vocabulary.train(["ha ha ha"] * 50, 1000, kind)
    assert repeated.decode(repeated.encode("ha ha")) == "ha ha"
    assert len(Vocabulary.train(["ha"], 1000, kind)) <= 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "line",
    [
        "一个男人戴着绿色的帽子穿过街道",
        "x</s>y <pad> <s> <unk> </s></s>",
        "<unk>",
        "  two  spaces\u00a0and\ta tab ",
        unicodedata.normalize("NFC", "Müller, élan"),
        unicodedata.normalize("NFD", "Müller, élan"),
        "🎉👩‍👩‍👧 fin",
    ],
)
def test_odd_text_comes_back_and_holds_no_special(kind: str, line: str) -> None:
    vocabulary = Vocabulary.train([line, *LINES], 300, kind)
    ids = vocabulary.encode(line)
    assert min(ids) > EOS
    assert vocabulary.decode(ids) == line


def test_the_mark_of_sentencepiece_comes_back_as_a_space_from_subwords_alone() -> None:
    for kind in KINDS:
        vocabulary = Vocabulary.train(["a▁b", "a b"], 100, kind)
        assert vocabulary.decode(vocabulary.encode("a▁b")) == ("a b" if kind in SUBWORDS else "a▁b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hut, (die 3 T-Shirts)!", ["▁Hut", ",", "▁(", "die", "▁3", "▁T", "-", "Shirts", ")", "!"]),
        ("  a  b ", ["▁", "▁", "▁a", "▁", "▁b", "▁"]),
        (unicodedata.normalize("NFD", "élan"), ["▁e\u0301lan"]),
        ("हिन्दी में", ["▁हिन्दी", "▁में"]),
    ],
)
def test_a_text_is_cut_into_words(text: str, words: list[str]) -> None:
    vocabulary = Vocabulary.train([text], 100, "word")
    assert vocabulary.pieces(vocabulary.encode(text)) == words


@pytest.mark.parametrize(("kind", "cut"), [("word", str.split), ("character", list)])
def test_the_most_frequent_are_kept(kind: str, cut: type[list]) -> None:
    lines = [" ".join("abcdefgh"[number % (1 + number // 9)] for number in range(length)) for length in range(1, 60)]
    counts = Counter(word for line in lines for word in cut(line))
    vocabulary = Vocabulary.train(lines, 4 + 5, kind)
    assert len(vocabulary) == 9
    for word, _ in counts.most_common(5):
        assert UNKNOWN not in vocabulary.encode(word)
    assert len(counts) > 6
    for word, _ in counts.most_common()[5:]:
        assert vocabulary.encode(word) == [UNKNOWN]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lines", [[], [""], ["", ""]])
def test_no_text_is_an_error(lines: list[str], kind: str) -> None:
    with pytest.raises(UserError, match="there is no text"):
        Vocabulary.train(lines, 100, kind)


@pytest.mark.parametrize("kind", SUBWORDS)
def test_more_characters_than_there_is_room_for_are_an_error(kind: str) -> None:
    with pytest.raises(UserError, match="no vocabulary of 8 subwords can be learnt from this text: Vocabulary size is"):
        Vocabulary.train(["abcdefgh 12345"], 8, kind)


def test_a_vocabulary_with_the_usual_names_of_the_specials_is_read() -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=written,
        model_type="bpe",
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=PAD,
        unk_id=UNKNOWN,
        bos_id=BOS,
        eos_id=EOS,
        minloglevel=2,
    )
    document = {"kind": "sentencepiece", "model": base64.b64encode(written.getvalue()).decode()}
    vocabulary = Vocabulary.from_json(document)
    assert vocabulary.pieces([PAD, UNKNOWN, BOS, EOS]) == list(SPECIALS)
    assert vocabulary.decode([BOS, *vocabulary.encode(LINES[0]), EOS]) == LINES[0]


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kind": "sentencepiece"},
        {"kind": "sentencepiece", "model": "no base64!"},
        {"kind": "sentencepiece", "model": "bm8gbW9kZWw="},
        {"kind": "word"},
        {"kind": "character", "words": 3},
        {"kind": "character", "words": [["a"]]},
    ],
)
def test_a_damaged_vocabulary_is_an_error(document: dict[str, object]) -> None:
    with pytest.raises(UserError, match="the vocabulary of the checkpoint is damaged"):
        Vocabulary.from_json(document)


def test_a_vocabulary_of_a_later_version_is_an_error() -> None:
    with pytest.raises(UserError, match="of a kind not known here, `bytes`") as refused:
        Vocabulary.from_json({"kind": "bytes"})
    assert refused.value.hint == "upgrade dl7"
