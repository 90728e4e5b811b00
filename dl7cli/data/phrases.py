"""`builtin:phrases`: English sentences and their German translations, written by a grammar from a fixed seed.

An English sentence has one translation here. German wants what English does not show: gender and case of
articles, adjectives and pronouns, the verb in second place (first in questions, last in subordinate clauses),
separable prefixes, participles and infinitives at the end, objects in another order, `nicht` or `kein`,
contracted prepositions.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

from dl7cli.data import lexicon
from dl7cli.data.lexicon import FIXED, POSSESSIVES, Case, Fixed, NounPhrase, Phrase, Verb

SEED = 7101
SIZES = {"test": 1000, "validation": 500, "train": 24_000}
LENGTHS = range(4, 15)  # words of a sentence, in both languages
RARE = 20  # word forms with fewer occurrences are left out, so that none in the test is unknown


class Clause(NamedTuple):
    """`mode`: `present`, `past` or a key of `MODALS`; `place`: English preposition, phrase, German case."""

    subject: Phrase
    verb: Verb
    mode: str = "present"
    negated: bool = False
    object: Phrase | None = None
    receiver: Phrase | None = None
    place: tuple[str, Phrase, Case] | None = None
    state: str = ""
    time: str = ""
    fronted: bool = False  # the time stands first


class Sentence(NamedTuple):
    """`kind`: `statement`, `question`, `who`, a key of `QUESTIONS`, or of `CONJUNCTIONS` for two clauses."""

    kind: str
    main: Clause
    second: Clause | None = None
    second_first: bool = False


def _is_pronoun(phrase: Phrase | None) -> bool:
    return isinstance(phrase, Fixed) and phrase.subject not in lexicon.NAMES


def render(sentence: Sentence) -> tuple[str, str]:
    """The sentence in English and in German, capitalised and with its punctuation."""
    kind, main, second, second_first = sentence
    mark = "."
    if second is not None:
        subordinate = kind not in ("and", "but")
        joint = f"{'' if kind == 'and' else ','} {lexicon.CONJUNCTIONS[kind]} "
        after = german(second, "last" if subordinate else "second")
        if second_first:
            first = f"{kind} {english(second)}, {english(main)}"
            translation = f"{lexicon.CONJUNCTIONS[kind]} {after}, {german(main, 'first')}"
        else:
            first = f"{english(main)}{',' if kind == 'but' else ''} {kind} {english(second)}"
            translation = german(main, "second") + joint + after
    elif kind in ("statement", "who"):
        first, translation = english(main), german(main, "second")
        mark = "?" if kind == "who" else "."
    else:
        opening = (f"{kind} ", f"{lexicon.QUESTIONS[kind]} ") if kind in lexicon.QUESTIONS else ("", "")
        first = opening[0] + english(main, question=True)
        translation = opening[1] + german(main, "first")
        mark = "?"
    return first[0].upper() + first[1:] + mark, translation[0].upper() + translation[1:] + mark


def english(clause: Clause, *, question: bool = False) -> str:
    """The words of a clause in English."""
    auxiliary, verb = _english_verb(clause, question)
    negation = ["not"] if clause.negated else []
    if [auxiliary, *negation] == ["can", "not"] and not question:
        auxiliary, negation = "cannot", []
    subject = clause.subject.english(subject=True)
    words = [auxiliary, subject, *negation, verb] if question else [subject, auxiliary, *negation, verb]
    words.append(clause.verb.particle)
    if clause.object is not None:
        words.append(clause.object.english(subject=False))
    if clause.receiver is not None:
        words += ["to", clause.receiver.english(subject=False)]
    if clause.place is not None:
        words += [clause.place[0], clause.place[1].english(subject=False)]
    words.append(clause.state)
    words = [clause.time, *words] if clause.fronted else [*words, clause.time]
    return " ".join(word for word in words if word)


def _english_verb(clause: Clause, question: bool) -> tuple[str, str]:
    """The auxiliary (or nothing) and the rest of the verb."""
    mode, person, base = clause.mode, clause.subject.person, clause.verb.english
    third = person == "3s"
    if mode in ("can", "could", "must", "should", "will"):
        return mode, base
    if clause.verb is lexicon.BE:
        if mode == "past":
            return "was" if person in ("1s", "3s") else "were", ""
        return {"1s": "am", "3s": "is"}.get(person, "are"), ""
    past, infinitive = clause.verb.past, base
    if mode in ("want", "wanted"):
        base, past, infinitive, rest = "want", "wanted", f"want to {base}", f" to {base}"
    else:
        rest = ""
    gone = mode in ("past", "wanted")
    if question or clause.negated:
        return "did" if gone else "does" if third else "do", infinitive
    return "", (past if gone else _third_person(base) if third else base) + rest


def _third_person(base: str) -> str:
    if base == "have":
        return "has"
    if base[-1] == "y" and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "sh", "ch", "x", "o")) else "s")


def german(clause: Clause, order: str) -> str:
    """The words of a clause in German, its finite verb `second`, `first` (questions) or `last`."""
    finite, *end = _german_verb(clause)
    subject = clause.subject.german("nominative")
    middle = _german_middle(clause)
    match order:
        case "last":
            # A separable prefix is the one thing that is written together with the finite verb behind it.
            joined = "".join(end) + finite if end == [clause.verb.prefix] else " ".join([*end, finite])
            words = [subject, *middle, joined]
        case "second" if clause.fronted:
            words = [lexicon.TIMES[clause.time], finite, subject, *middle, *end]
        case "second":
            words = [subject, finite, *middle, *end]
        case _:
            words = [finite, subject, *middle, *end]
    return " ".join(words)


def _german_middle(clause: Clause) -> list[str]:
    """What stands between the finite verb and the end: pronouns, time, receiver, object, `nicht`, rest."""
    verb, thing, receiver = clause.verb, clause.object, clause.receiver
    case: Case = "dative" if verb.case == "dat" else "accusative"
    words = []
    negation = ["nicht"] if clause.negated else []
    if clause.negated and isinstance(thing, NounPhrase) and thing.determiner in ("a", ""):
        thing, negation = thing._replace(determiner="no"), []
    if receiver is not None and _is_pronoun(receiver):
        words.append(receiver.german("dative"))
    if thing is not None and _is_pronoun(thing) and not verb.preposition:
        words.append(thing.german(case))
    if clause.time and not clause.fronted:
        words.append(lexicon.TIMES[clause.time])
    if receiver is not None and not _is_pronoun(receiver):
        words.append(receiver.german("dative"))
    if thing is not None and not _is_pronoun(thing) and not verb.preposition:
        words.append(thing.german(case))
    words += negation
    if thing is not None and verb.preposition:
        words.append(_prepositional(verb.preposition, thing, case))
    if clause.place is not None:
        preposition, phrase, place_case = clause.place
        words.append(_prepositional(lexicon.PREPOSITIONS[preposition], phrase, place_case))
    if clause.state:
        words.append(lexicon.ADJECTIVES[clause.state])
    return words


def _prepositional(preposition: str, phrase: Phrase, case: Case) -> str:
    words = f"{preposition} {phrase.german(case)}"
    first = " ".join(words.split()[:2])
    return lexicon.CONTRACTIONS[first] + words[len(first) :] if first in lexicon.CONTRACTIONS else words


def _german_verb(clause: Clause) -> list[str]:
    """The finite verb and what goes with it to the end: prefix, participle or infinitive."""
    verb, mode, person = clause.verb, clause.mode, clause.subject.person
    plural = person.endswith("p")
    if mode in lexicon.MODALS:
        finite = "werde" if (mode, person) == ("will", "1s") else lexicon.MODALS[mode][plural]
        return [finite, verb.prefix + verb.infinitive]
    if mode == "past":
        if verb.english in lexicon.SIMPLE_PAST:
            ending = ("n" if verb.participle.endswith("e") else "en") if plural else ""
            return [verb.participle + ending]
        first, third, many = {"haben": ("habe", "hat", "haben"), "sein": ("bin", "ist", "sind")}[verb.auxiliary]
        return [{"1s": first, "3s": third}.get(person, many), verb.participle]
    present = {"1s": lexicon.FIRST_PERSON.get(verb.infinitive, verb.infinitive[:-1]), "3s": verb.third}
    finite = present.get(person, lexicon.PLURAL.get(verb.infinitive, verb.infinitive))
    return [finite, verb.prefix] if verb.prefix else [finite]


# Sampling. Every choice comes from one stream of numbers in [0, 1), so the sentences never change.

_Item = TypeVar("_Item")

DEFINITE = (*["the"] * 6, *POSSESSIVES, "this")
SUBJECT = (*DEFINITE, *DEFINITE, "a", "a", "every", "two", "three", "many")
OBJECT = (*["the"] * 6, *POSSESSIVES, *["a"] * 5, "this", "two", "three", "many", "", "")
WITH_KEIN = (*["the"] * 4, *POSSESSIVES, *["a"] * 5, "this", "", "")  # where `nicht` may become `kein`
NOW = (*["present"] * 6, "can", "must", "should", "want", "will", "will")
BEFORE = (*["past"] * 5, "could", "wanted")
CONDITION = ("present", "present", "present", "can", "want")
CONSEQUENCE = ("present", "present", "will", "will", "can", "must", "should")
QUESTION_KINDS = ("question", "who", *lexicon.QUESTIONS)
KINDS = (
    *["statement"] * 42, *["question"] * 8, *["who"] * 4, *["why"] * 3, *["when"] * 3, *["where"] * 2,
    *["because"] * 9, *["although"] * 3, *["if"] * 9, *["that"] * 9, *["and"] * 4, *["but"] * 4,
)  # fmt: skip
QUALITIES = {group: words.split() for group, words in lexicon.QUALITIES.items()}
STATES = QUALITIES | {group: words.split() for group, words in lexicon.STATES.items()}


@cache
def _verbs_for(kind: str, mode: str, person: bool) -> list[Verb]:
    """The verbs that make sense in such a sentence; `person`: with a person as its subject."""
    modal = mode not in ("present", "past")
    return [
        verb
        for verb in lexicon.VERBS
        if not (person and "P" not in verb.subjects)
        and not ("r" in verb.flags and mode == "past")
        and not ("s" in verb.flags and (modal or kind == "when"))
        and not ("n" in verb.flags and modal and mode != "will")
        and not ("p" not in verb.flags and kind == "where")
    ]


class _Sampler:
    def __init__(self, seed: int) -> None:
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._numbers: list[float] = []

    def _number(self) -> float:
        if not self._numbers:
            self._numbers = self._random.random(1 << 16).tolist()
        return self._numbers.pop()

    def pick(self, items: Sequence[_Item]) -> _Item:
        return items[int(self._number() * len(items))]

    def chance(self, probability: float) -> bool:
        return self._number() < probability

    def noun_phrase(self, groups: str, determiners: Sequence[str], adjective: float) -> NounPhrase:
        group = self.pick(groups)
        noun, determiner = self.pick(lexicon.NOUNS[group]), self.pick(determiners)
        if noun.english in (lexicon.UNRELATED | lexicon.PUBLIC) and determiner in POSSESSIVES:
            determiner = "the"
        elif noun.english in lexicon.RELATED and determiner not in ("the", "two"):
            determiner = self.pick(POSSESSIVES)
        if noun in lexicon.ALONE:
            plural = False
            if group == "L" or determiner not in (*POSSESSIVES, "this"):
                determiner = "the"
        else:
            plural = determiner in ("", "two", "three", "many")
            plural = plural or (determiner not in ("a", "every") and self.chance(0.3))
        word = self.pick(QUALITIES[group]) if self.chance(adjective) else ""
        return NounPhrase(determiner, "" if (word, noun.english) in lexicon.UNFIT else word, noun, plural)

    def subject(self, groups: str, determiners: Sequence[str]) -> Phrase:
        if "P" in groups:
            if self.chance(0.24):
                return FIXED[self.pick(("I", "he", "she", "we", "they"))]
            if self.chance(0.14):
                return FIXED[self.pick(("Anna", "Maria", "Peter", "Paul"))]
            groups += "PP"
        return self.noun_phrase(groups, determiners, 0.3)

    def object(self, subject: Phrase, groups: str, determiners: Sequence[str], adjective: float) -> Phrase:
        """An object that is not what the subject is."""
        while True:
            thing: Phrase
            if "P" in groups and self.chance(0.3):
                others = ("he", "she", "they", "Anna", "Maria", "Peter", "Paul")
                thing = FIXED[self.pick(others if subject.person[0] == "1" else (*others, "I", "we"))]
            else:
                thing = self.noun_phrase(groups, determiners, adjective)
            if not _alike(thing, subject):
                return thing

    def clause(self, kind: str, modes: Sequence[str], subject: Phrase | None = None, state: float = 0.2) -> Clause:
        """One clause for a sentence of this kind, short if it is one of two; a `subject` is a person."""
        mode = self.pick(modes)
        negated = kind not in (*QUESTION_KINDS, "that") and mode != "must" and self.chance(0.2)
        if kind != "where" and self.chance(state):
            return self._state(kind, mode, negated, subject)
        verb = self.pick(_verbs_for(kind, mode, subject is not None))
        if subject is None:
            plain = kind == "statement" and not negated
            subject = self.subject(verb.subjects, SUBJECT if plain else DEFINITE)
        single = kind == "statement" or kind in QUESTION_KINDS
        adjective = 0.35 if single else 0.15
        thing = receiver = None
        place: tuple[str, Phrase, Case] | None = None
        if verb.objects:
            direct = verb.case in ("acc", "give") and not verb.preposition
            determiners = OBJECT if not negated else WITH_KEIN if direct else DEFINITE
            thing = self.object(subject, verb.objects, determiners, adjective)
        if verb.case == "give":
            receiver = self.object(subject, "P", DEFINITE if negated else OBJECT, adjective / 2)
        if "l" in verb.flags or "L" in verb.flags:
            case: Case = "accusative" if "L" in verb.flags else "dative"
            place = self.pick(("on", "under", "beside")), self.noun_phrase("S", DEFINITE, adjective), case
        elif "p" in verb.flags and kind != "where" and not negated and self.chance(0.4 if single else 0.15):
            place = self._place(adjective)
        time, fronted = "", False
        if single and kind != "when" and "s" not in verb.flags and self.chance(0.4):
            time = self.pick(lexicon.TIMES_OF[mode])
            fronted = kind == "statement" and self.chance(0.5)
            if negated and not fronted:
                time = ""  # where it stands beside `nicht` is a matter of taste
        return Clause(subject, verb, mode, negated, thing, receiver, place, "", time, fronted)

    def _place(self, adjective: float) -> tuple[str, Phrase, Case]:
        if self.chance(0.3):
            near = self.pick(("behind", "in front of"))
            return near, self.noun_phrase("B", DEFINITE, adjective), "dative"
        return "in", self.noun_phrase("LLB", DEFINITE, adjective), "dative"

    def _state(self, kind: str, mode: str, negated: bool, subject: Phrase | None) -> Clause:
        """A clause with `be` and an adjective."""
        group = "P"
        if subject is None:
            things = kind in ("statement", "that") or kind in QUESTION_KINDS
            group = self.pick("PPPPDAFRECTMOLBS" if things else "PPPD")
            subject = self.subject(group, DEFINITE)
        state = self.pick(STATES[group])
        if isinstance(subject, NounPhrase):
            subject = subject._replace(adjective="")
            if (state, subject.noun.english) in lexicon.UNFIT:
                state = "small"
        return Clause(subject, lexicon.BE, "past" if mode in BEFORE else "present", negated, state=state)

    def sentence(self) -> Sentence:
        """One sentence of any kind."""
        kind = self.pick(KINDS)
        modes = BEFORE if self.chance(0.4) else NOW
        if kind == "statement" or kind in QUESTION_KINDS:
            return Sentence(kind, self.clause(kind, modes, FIXED["who"] if kind == "who" else None))
        if kind == "that":
            verb = self.pick(lexicon.THAT_VERBS)
            negated = verb.english in ("know", "believe") and self.chance(0.3)
            main = Clause(self.subject("P", DEFINITE), verb, "past" if modes is BEFORE else "present", negated)
            return Sentence(kind, main, self._second(kind, modes, main, 0.3))
        if kind == "if":
            condition = self.clause(kind, CONDITION)
            main = self._second(kind, CONSEQUENCE, condition, 0.7)
            pronoun_after = main.subject == FIXED.get(condition.subject.pronoun)
            return Sentence(kind, main, condition, second_first=pronoun_after or self.chance(0.5))
        main = self.clause(kind, modes)
        same = 0.0 if kind in ("and", "but") else 0.8
        return Sentence(kind, main, self._second(kind, modes, main, same))

    def _second(self, kind: str, modes: Sequence[str], first: Clause, same: float) -> Clause:
        """Another clause; with probability `same` its subject is the pronoun for that of the first."""
        state = 0.5 if kind == "because" else 0.2
        pronoun = FIXED[first.subject.pronoun] if first.subject.pronoun and self.chance(same) else None
        while True:
            clause = self.clause(kind, modes, pronoun, state)
            repeats = clause.verb == first.verb and clause.state == first.state
            if not repeats and (pronoun is not None or not _alike(clause.subject, first.subject)):
                return clause


def _alike(one: Phrase, other: Phrase) -> bool:
    if isinstance(one, NounPhrase) and isinstance(other, NounPhrase):
        return one.noun == other.noun
    return one == other


@cache
def _corpus() -> list[tuple[str, str]]:
    """All pairs, no sentence twice in either language, in the order in which the splits are cut."""
    sampler = _Sampler(SEED)
    pairs: dict[str, str] = {}
    translations: set[str] = set()
    total = sum(SIZES.values())
    while len(pairs) < total * 1.07:
        source, target = render(sampler.sentence())
        fits = len(source.split()) in LENGTHS and len(target.split()) in LENGTHS
        if fits and source not in pairs and target not in translations:
            pairs[source] = target
            translations.add(target)
    counts = Counter(word for pair in pairs.items() for word in _words(*pair))
    common = [pair for pair in pairs.items() if all(counts[word] >= RARE for word in _words(*pair))]
    return common[:total]


def _words(source: str, target: str) -> list[str]:
    return f"{source} {target}".replace(",", "").replace(".", "").replace("?", "").split()


def generate(split: str) -> list[tuple[str, str]]:
    """The (English, German) pairs of `train` (24,000), `validation` (500) or `test` (1,000).

    The same list comes out at every call. No sentence of one split is in another, in either language.
    Raises KeyError for another split.
    """
    start = 0
    for name, size in SIZES.items():
        if name == split:
            return _corpus()[start : start + size]
        start += size
    raise KeyError(split)
