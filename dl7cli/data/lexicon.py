"""The words behind `builtin:phrases`: tables of English and German words, and their inflection."""

from typing import Literal, NamedTuple

# Groups of nouns: P persons, D domestic and A wild animals, F food, R papers, E letters, W what is written or
# sung, C clothes, T things, M machines, O what opens, L places, B buildings, S furniture to lay things on.
# English, its plural; German, gender, its plural; ending of the weak masculines.
NOUNS_TABLE = {
    "P": """man men Mann m Männer; woman women Frau f Frauen; child children Kind n Kinder
        girl girls Mädchen n Mädchen; boy boys Junge m Jungen n; teacher teachers Lehrer m Lehrer
        doctor doctors Arzt m Ärzte; uncle uncles Onkel m Onkel; aunt aunts Tante f Tanten
        grandmother grandmothers Großmutter f Großmütter; neighbour neighbours Nachbar m Nachbarn n
        student students Student m Studenten en; friend friends Freund m Freunde
        farmer farmers Bauer m Bauern n; sister sisters Schwester f Schwestern
        brother brothers Bruder m Brüder""",
    "D": "dog dogs Hund m Hunde; cat cats Katze f Katzen; horse horses Pferd n Pferde; cow cows Kuh f Kühe",
    "A": """bird birds Vogel m Vögel; bear bears Bär m Bären en; lion lions Löwe m Löwen n
        mouse mice Maus f Mäuse""",
    "F": """apple apples Apfel m Äpfel; cake cakes Kuchen m Kuchen; egg eggs Ei n Eier
        banana bananas Banane f Bananen; sausage sausages Wurst f Würste; roll rolls Brötchen n Brötchen
        potato potatoes Kartoffel f Kartoffeln""",
    "R": "book books Buch n Bücher; newspaper newspapers Zeitung f Zeitungen",
    "E": "letter letters Brief m Briefe",
    "W": "story stories Geschichte f Geschichten; poem poems Gedicht n Gedichte; song songs Lied n Lieder",
    "C": """hat hats Hut m Hüte; coat coats Mantel m Mäntel; shirt shirts Hemd n Hemden
        dress dresses Kleid n Kleider; jacket jackets Jacke f Jacken""",
    "T": """ball balls Ball m Bälle; key keys Schlüssel m Schlüssel; cup cups Tasse f Tassen
        picture pictures Bild n Bilder; knife knives Messer n Messer
        umbrella umbrellas Regenschirm m Regenschirme""",
    "M": """car cars Auto n Autos; bicycle bicycles Fahrrad n Fahrräder; clock clocks Uhr f Uhren
        lamp lamps Lampe f Lampen""",
    "O": "door doors Tür f Türen; window windows Fenster n Fenster; cupboard cupboards Schrank m Schränke",
    "L": """garden - Garten m -; kitchen - Küche f -; park - Park m -; city - Stadt f -; village - Dorf n -
        forest - Wald m -""",
    "B": """house - Haus n -; school - Schule f -; museum - Museum n -; hotel - Hotel n -; church - Kirche f -
        station - Bahnhof m -""",
    "S": "table - Tisch m -; bed - Bett n -; bench - Bank f -; chair - Stuhl m -; sofa - Sofa n -",
}
UNRELATED = {"man", "woman", "girl", "boy", "farmer", "bear", "lion", "bird", "mouse"}  # 'my man' is odd
PUBLIC = {"museum", "hotel", "church", "station"}  # so is 'my station'
RELATED = {"uncle", "aunt", "grandmother", "sister", "brother"}  # and 'many grandmothers'

# English: German as a predicate, and the stem that takes endings where it is another.
ADJECTIVES = {
    "old": "alt", "new": "neu", "young": "jung", "tall": "groß", "big": "groß", "small": "klein",
    "good": "gut", "friendly": "freundlich", "clever": "klug", "happy": "glücklich", "sad": "traurig",
    "rich": "reich", "tired": "müde", "hungry": "hungrig", "ill": "krank", "fast": "schnell",
    "fresh": "frisch", "cheap": "billig",
    "expensive": "teuer", "long": "lang", "quiet": "ruhig", "beautiful": "schön", "red": "rot",
    "black": "schwarz", "white": "weiß", "green": "grün",
}  # fmt: skip
STEMS = {"expensive": "teur", "tired": "müd"}
_WARES = "old new red black white green beautiful expensive cheap"
QUALITIES = {  # the adjectives that go with each group
    "P": "old young tall small friendly clever happy sad rich",
    "D": "old young big small hungry clever fast",
    "A": "old young big small hungry clever fast", "F": "big small fresh cheap good",
    "R": "old new good long expensive", "E": "old new long sad", "W": "old new good long sad beautiful",
    "C": _WARES, "T": _WARES, "M": _WARES, "O": "old new red white green small",
    "L": "old small big beautiful quiet", "B": "old new small big beautiful",
    "S": "old new big small beautiful",
}  # fmt: skip
STATES = {  # and those that stand after `be`, where they are not the same
    "P": "tired tired hungry hungry ill ill happy happy sad sad rich old friendly",
    "D": "tired hungry ill clever", "A": "tired hungry fast",
}  # fmt: skip
UNFIT = {
    ("young", "grandmother"),
    *((word, child) for word in ("old", "young", "rich") for child in ("child", "girl", "boy")),
}

# Base, past and particle in English; infinitive (prefix| when separable), third person, participle and
# auxiliary in German; groups of subjects; case of the object (after a preposition, or `give`: dative and
# accusative) and its groups; flags: p may have a place, s stative, n nothing done on purpose, l and L with a
# surface in the dative or accusative, r past spelt like present.
VERBS_TABLE = """
sleep slept - schlafen schläft geschlafen haben PDA - - p
laugh laughed - lachen lacht gelacht haben P - - p
cry cried - weinen weint geweint haben P - - pn
sing sang - singen singt gesungen haben P - - p
dance danced - tanzen tanzt getanzt haben P - - p
work worked - arbeiten arbeitet gearbeitet haben P - - p
get got up auf|stehen steht aufgestanden sein P - - -
wake woke up auf|wachen wacht aufgewacht sein PDA - - n
fall fell asleep ein|schlafen schläft eingeschlafen sein PDA - - pn
arrive arrived - an|kommen kommt angekommen sein P - - -
see saw - sehen sieht gesehen haben PDA acc PDAB -
hear heard - hören hört gehört haben PDA acc PDAW n
love loved - lieben liebt geliebt haben P acc PD s
find found - finden findet gefunden haben P acc PDTCE p
look looked for suchen sucht gesucht haben PDA acc PD p
look looked at an|sehen sieht angesehen haben P acc PDATME -
look looked after auf|passen passt aufgepasst haben P auf+acc PD -
visit visited - besuchen besucht besucht haben P acc PPB -
meet met - treffen trifft getroffen haben P acc P p
draw drew - zeichnen zeichnet gezeichnet haben P acc PDAB -
eat ate - essen isst gegessen haben P acc F p
read read - lesen liest gelesen haben P acc REW pr
write wrote - schreiben schreibt geschrieben haben P acc EW p
buy bought - kaufen kauft gekauft haben P acc FRCTMD -
sell sold - verkaufen verkauft verkauft haben P acc FRCTMD -
need needed - brauchen braucht gebraucht haben P acc RCTM s
have had - haben hat hatte haben P acc DCTM s
lose lost - verlieren verliert verloren haben P acc TCE n
forget forgot - vergessen vergisst vergessen haben P acc TCREW n
carry carried - tragen trägt getragen haben P acc FTR -
wash washed - waschen wäscht gewaschen haben P acc DC -
clean cleaned - putzen putzt geputzt haben P acc O -
repair repaired - reparieren repariert repariert haben P acc M -
call called - an|rufen ruft angerufen haben P acc P -
invite invited - ein|laden lädt eingeladen haben P acc P -
open opened - auf|machen macht aufgemacht haben P acc O -
close closed - zu|machen macht zugemacht haben P acc O -
put put on an|ziehen zieht angezogen haben P acc C r
take took off aus|ziehen zieht ausgezogen haben P acc C -
take took along mit|nehmen nimmt mitgenommen haben P acc TRCD -
bring brought back zurück|bringen bringt zurückgebracht haben P acc TRC -
help helped - helfen hilft geholfen haben P dat P -
thank thanked - danken dankt gedankt haben P dat P -
answer answered - antworten antwortet geantwortet haben P dat P -
trust trusted - vertrauen vertraut vertraut haben P dat P s
follow followed - folgen folgt gefolgt sein PDA dat PDA -
listen listened to zu|hören hört zugehört haben P dat P -
belong belonged to gehören gehört gehörte haben RECTM dat P s
give gave - geben gibt gegeben haben P give FRET -
show showed - zeigen zeigt gezeigt haben P give ERTMC -
send sent - schicken schickt geschickt haben P give ERT -
lend lent - leihen leiht geliehen haben P give RCTM -
wait waited for warten wartet gewartet haben P auf+acc P p
think thought of denken denkt gedacht haben P an+acc P n
talk talked about sprechen spricht gesprochen haben P über+acc PREW -
speak spoke with sprechen spricht gesprochen haben P mit+dat P p
play played with spielen spielt gespielt haben PD mit+dat PDT p
dream dreamed of träumen träumt geträumt haben P von+dat PDBM n
go went into gehen geht gegangen sein P in+acc LB -
drive drove to fahren fährt gefahren sein P zu+dat B -
run ran through laufen läuft gelaufen sein PDA durch+acc L -
come came from kommen kommt gekommen sein P aus+dat LB -
lie lay - liegen liegt lag haben RECT - - sl
lay laid - legen legt gelegt haben P acc TREC L
"""
THAT_TABLE = """
say said - sagen sagt gesagt haben P - - -
know knew - wissen weiß wusste haben P - - -
think thought - denken denkt gedacht haben P - - -
believe believed - glauben glaubt geglaubt haben P - - -
hope hoped - hoffen hofft gehofft haben P - - -
hear heard - hören hört gehört haben P - - -
"""
# These have a simple past in German; it stands in the participle's column.
SIMPLE_PAST = {"have", "know", "be", "belong", "lie"}
FIRST_PERSON = {"wissen": "weiß", "sein": "bin"}  # others end in -e
PLURAL = {"sein": "sind"}  # others are the infinitive

# English subject and object; German nominative, accusative, dative; person and number; what takes it up.
PRONOUNS_TABLE = {
    "I": "me ich mich mir 1s I", "he": "him er ihn ihm 3s he", "she": "her sie sie ihr 3s she",
    "we": "us wir uns uns 1p we", "they": "them sie sie ihnen 3p they", "who": "- wer - - 3s -",
}  # fmt: skip
NAMES = {"Anna": "she", "Maria": "she", "Peter": "he", "Paul": "he"}

# Finite forms of the German auxiliaries: third (and first) person, plural.
MODALS = {
    "can": ("kann", "können"), "could": ("konnte", "konnten"), "must": ("muss", "müssen"),
    "should": ("sollte", "sollten"), "will": ("wird", "werden"), "want": ("will", "wollen"),
    "wanted": ("wollte", "wollten"),
}  # fmt: skip
TIMES = {
    "every day": "jeden Tag", "in the morning": "am Morgen", "in the evening": "am Abend",
    "on Sunday": "am Sonntag", "sometimes": "manchmal", "today": "heute", "yesterday": "gestern",
    "last week": "letzte Woche", "two days ago": "vor zwei Tagen", "tomorrow": "morgen", "soon": "bald",
    "next week": "nächste Woche",
}  # fmt: skip
_EARLIER = ("yesterday", "last week", "two days ago", "on Sunday")
_AHEAD = ("today", "tomorrow", "on Sunday")
TIMES_OF = {
    "present": ("every day", "in the morning", "in the evening", "on Sunday", "sometimes", "today"),
    "past": _EARLIER, "could": _EARLIER, "wanted": _EARLIER, "will": ("tomorrow", "soon", "next week"),
    "can": _AHEAD, "must": _AHEAD, "should": _AHEAD, "want": _AHEAD,
}  # fmt: skip
PREPOSITIONS = {
    "in": "in", "behind": "hinter", "in front of": "vor", "on": "auf", "under": "unter", "beside": "neben",
}  # fmt: skip
CONTRACTIONS = {
    "in dem": "im",
    "in das": "ins",
    "zu dem": "zum",
    "zu der": "zur",
    "von dem": "vom",
    "an dem": "am",
}
CONJUNCTIONS = {
    "because": "weil",
    "although": "obwohl",
    "if": "wenn",
    "that": "dass",
    "and": "und",
    "but": "aber",
}
QUESTIONS = {"why": "warum", "when": "wann", "where": "wo"}

Case = Literal["nominative", "accusative", "dative"]
# Endings of articles, and of adjectives where no article shows them: masculine, feminine, neuter, plural.
STRONG = {
    "nominative": {"m": "er", "f": "e", "n": "es", "p": "e"},
    "accusative": {"m": "en", "f": "e", "n": "es", "p": "e"},
    "dative": {"m": "em", "f": "er", "n": "em", "p": "en"},
}
THE = {"er": "der", "e": "die", "es": "das", "en": "den", "em": "dem"}
EIN_WORDS = {
    "a": "ein",
    "no": "kein",
    "my": "mein",
    "our": "unser",
    "his": "sein",
    "her": "ihr",
    "their": "ihr",
}
DER_WORDS = {"this": "dies", "every": "jed"}
NUMBERS = {"two": "zwei", "three": "drei"}
POSSESSIVES = ("my", "our", "his", "her", "their")


class Noun(NamedTuple):
    """One noun with its forms; `weak` is the ending that some masculines take but in the nominative."""

    group: str
    english: str
    english_plural: str
    german: str
    gender: str
    german_plural: str
    weak: str = ""


class Verb(NamedTuple):
    """One verb in both languages; the columns of `VERBS_TABLE`."""

    english: str
    past: str
    particle: str
    prefix: str
    infinitive: str
    third: str
    participle: str
    auxiliary: str
    subjects: str
    preposition: str
    case: str
    objects: str
    flags: str


def _nouns(group: str, table: str) -> list[Noun]:
    return [Noun(group, *row.split()) for row in table.replace("\n", ";").split(";")]


def _verbs(table: str) -> list[Verb]:
    verbs = []
    for row in table.strip().splitlines():
        columns = ["" if column == "-" else column for column in row.split()]
        english, past, particle, infinitive, third, participle, auxiliary, subjects, case, objects, flags = columns
        prefix, _, infinitive = infinitive.rpartition("|")
        preposition, _, case = case.rpartition("+")
        german = (prefix, infinitive, third, participle, auxiliary)
        verbs.append(Verb(english, past, particle, *german, subjects, preposition, case, objects, flags))
    return verbs


NOUNS = {group: _nouns(group, table) for group, table in NOUNS_TABLE.items()}
ALONE = {noun for group in "LBS" for noun in NOUNS[group]}  # one of them is enough in a sentence
VERBS = _verbs(VERBS_TABLE)
THAT_VERBS = _verbs(THAT_TABLE)
BE = Verb("be", "was", "", "", "sein", "ist", "war", "sein", "", "", "", "", "s")


class Fixed(NamedTuple):
    """A pronoun or a name: forms that nothing else changes."""

    subject: str
    object: str
    nominative: str
    accusative: str
    dative: str
    person: str
    pronoun: str  # the pronoun that takes up this subject in another clause

    def english(self, *, subject: bool) -> str:
        return self.subject if subject else self.object

    def german(self, case: Case) -> str:
        return {"nominative": self.nominative, "accusative": self.accusative, "dative": self.dative}[case]


class NounPhrase(NamedTuple):
    """Determiner (one of the tables above, or nothing), adjective (or nothing) and noun."""

    determiner: str
    adjective: str
    noun: Noun
    plural: bool = False

    @property
    def person(self) -> str:
        return "3p" if self.plural else "3s"

    @property
    def pronoun(self) -> str:
        """The pronoun that takes up a person as a subject; nothing where English and German differ."""
        if self.noun.group != "P":
            return ""
        return "they" if self.plural else {"m": "he", "f": "she"}.get(self.noun.gender, "")

    def english(self, *, subject: bool) -> str:
        words = [self.adjective, self.noun.english_plural if self.plural else self.noun.english]
        words = [word for word in words if word]
        determiner = self.determiner
        if determiner == "a" and words[0][0] in "aeiou":
            determiner = "an"
        elif determiner == "this" and self.plural:
            determiner = "these"
        return " ".join([determiner, *words]).strip()

    def german(self, case: Case) -> str:
        key = "p" if self.plural else self.noun.gender
        strong = STRONG[case][key]
        weak = "e" if key != "p" and (case == "nominative" or (case == "accusative" and key != "m")) else "en"
        match self.determiner:
            case "the":
                article, ending = THE[strong], weak
            case "this" | "every":
                article, ending = DER_WORDS[self.determiner] + strong, weak
            case "many":
                article, ending = "viel" + strong, strong
            case "" | "two" | "three":
                article, ending = NUMBERS.get(self.determiner, ""), strong
            case _:
                bare = (key in "mn" and case == "nominative") or (key == "n" and case == "accusative")
                article = EIN_WORDS[self.determiner] + ("" if bare else strong)
                ending = strong if bare else weak
        adjective = self._stem() + ending if self.adjective else ""
        return " ".join(word for word in (article, adjective, self._german_noun(case)) if word)

    def _stem(self) -> str:
        return STEMS.get(self.adjective, ADJECTIVES[self.adjective])

    def _german_noun(self, case: Case) -> str:
        if self.plural:
            noun = self.noun.german_plural
            return noun + "n" if case == "dative" and noun[-1] not in "ns" else noun
        return self.noun.german + ("" if case == "nominative" else self.noun.weak)


Phrase = Fixed | NounPhrase

FIXED = {
    **{word: Fixed(word, *row.split()) for word, row in PRONOUNS_TABLE.items()},
    **{name: Fixed(name, name, name, name, name, "3s", pronoun) for name, pronoun in NAMES.items()},
}
