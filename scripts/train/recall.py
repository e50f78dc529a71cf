"""Synthetic recall: facts stated in sentences inside real text, questions about them after it.

An episode is a list of (text, weight) pieces. The weight is the piece's weight in the loss: 1 for text, 0 for a fact's
value where it is first stated (it is random), ANSWER for an answer, which only the text before it gives away.
"""

import random
import re

ANSWER = 3.0

NAMES = """Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Simon
Tina Ursula Victor Wendy Xavier Yara Zoe Adam Bella Clara Daniel Elena Felix Gina Hugo Ivan Julia Kurt Laura Martin Nora
Otto Peter Rachel Samuel Thomas Uma Vera Walter Amir Bruno Chen Diego Eva Farid Greta Hana Igor Jonas Kenji Lena Mona
Noah Olga Pablo Ravi Sara Tariq Yusuf Anna Ben Cora Dora Eric Fiona George Helen Ian Jane Kate Louis Mark Nadia Olivia
Paul Rita Stefan Tom Viola William Agnes Boris Celia Derek Edith Fred Gloria Harold Ingrid Jorge""".split()
ADJECTIVES = """north south east west red blue green yellow black white old new upper lower main inner outer small large
first second third front back left right central hidden silver golden quiet long narrow round""".split()
NOUNS = """gate door vault archive server printer office cabinet garage library lab workshop tower cellar safe warehouse
station bridge hangar kitchen studio router database cluster locker container elevator greenhouse chest harbor tunnel
depot clinic museum theater camera terminal backup boiler shed""".split()
NUMBERS = ["passkey", "access code", "PIN", "badge number", "locker number", "room number", "phone extension",
           "serial number", "order number", "combination", "ticket number", "door code", "account number",
           "invoice number", "port number", "secret number", "magic number", "entry code"]
WORDS = {
    "codename": """falcon otter badger heron lynx raven salmon beaver tiger eagle wolf panda cobra camel moose swan
                   turtle spider dolphin rabbit""".split(),
    "color": "red blue green yellow black white orange purple brown pink gray teal violet silver gold".split(),
    "password": """apple river stone candle window mirror ladder button pepper garden hammer basket copper marble
                   blanket pencil rocket walnut anchor lantern""".split(),
    "city": """Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Tokyo Cairo Lima Boston Chicago Sydney
               Delhi Seoul Toronto Athens""".split(),
}
STATEMENTS = ["The {a} {p} {s} is {v}.", "The {a} {p} {s} is {v}.", "The {a} {p} {s} is {v}.",
              "Note: the {a} {p} {s} is {v}.", "Remember that the {a} {p} {s} is {v}.",
              "Please note that the {a} {p} {s} is {v}.", "Important: the {a} {p} {s} is {v}."]
QUESTIONS = ["What is the {a} {p} {s}?", "What is the {a} {p} {s}?", "What is the {a} {p} {s}?",
             "Tell me the {a} {p} {s}."]


def value(rng: random.Random, attribute: str) -> str:
    if attribute in WORDS:
        return rng.choice(WORDS[attribute])
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((3, 4, 4, 5, 5, 5, 6, 7))))


def subject(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NAMES)
    if kind < 0.5:  # a name nobody has seen
        return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))).capitalize()
    if kind < 0.85:
        return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return f"the {rng.choice(NOUNS)}"


def facts(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Distinct (attribute, subject, value); half of the time all share the attribute, so that the subject decides."""
    shared = rng.choice(NUMBERS) if rng.random() < 0.5 else None
    chosen, result = set(), []
    subjects = [subject(rng) for _ in range(max(1, count if shared else (count + 1) // 2))]
    for i in range(4 * count):
        attribute = shared or (rng.choice(NUMBERS) if rng.random() < 0.75 else rng.choice(list(WORDS)))
        key = (attribute, subjects[i] if shared and i < len(subjects) else rng.choice(subjects))
        if key not in chosen and len(result) < count:
            chosen.add(key)
            result.append((*key, value(rng, attribute)))
    return result


def preposition(rng: random.Random, s: str) -> str:
    return rng.choice(("for", "of") if s.startswith("the ") else ("of", "of", "for"))


def statement(rng: random.Random, fact: tuple[str, str, str]) -> list[tuple[str, float]]:
    a, s, v = fact
    if not s.startswith("the ") and rng.random() < 0.25:
        text = f"{s}'s {a} is {{v}}."
    else:
        text = rng.choice(STATEMENTS).format(a=a, s=s, p=preposition(rng, s), v="{v}")
    before, after = text.split(" {v}")
    return [(before, 1.0), (" " + v, 0.0), (after, 1.0)]


def turn(rng: random.Random, fact: tuple[str, str, str], style: int) -> list[tuple[str, float]]:
    a, s, v = fact
    if style == 2:  # the sentence itself, to be completed
        return [(f"The {a} {preposition(rng, s)} {s} is", 1.0), (f" {v}", ANSWER), (".\n", 1.0)]
    if not s.startswith("the ") and rng.random() < 0.2:
        question = f"What is {s}'s {a}?"
    else:
        question = rng.choice(QUESTIONS).format(a=a, s=s, p=preposition(rng, s))
    ask, answer = ("Question: ", "Answer:") if style == 0 else ("Q: ", "A:")
    return [(f"{ask}{question}\n{answer}", 1.0), (f" {v}", ANSWER), ("\n", 1.0)]


def turns(rng: random.Random, asked: list[tuple[str, str, str]]) -> list[tuple[str, float]]:
    style = rng.choices((0, 1, 2), (0.75, 0.12, 0.13))[0]
    return [piece for fact in asked for piece in turn(rng, fact, style)]


SPOT = re.compile(r"(?<=[.!?]) (?=[A-Z])|\n+")


def scatter(rng: random.Random, filler: str, stated: list[tuple[str, str, str]]) -> list[tuple[str, float]]:
    """The filler with each fact in it at a random sentence or line end."""
    spots = [m for m in SPOT.finditer(filler)]
    depths = sorted(rng.random() for _ in stated)
    if rng.random() < 0.15:  # all together
        depths = [depths[0]] * len(stated)
    pieces, at = [], 0
    for depth, fact in zip(depths, stated):
        place = depth * len(filler)
        spot = min(spots, key=lambda m: abs(m.start() - place), default=None) if spots else None
        if spot is None or spot.start() < at:
            pieces += [(" ", 1.0) if pieces else ("", 1.0), *statement(rng, fact)]
            continue
        gap = spot.group()
        pieces.append((filler[at:spot.start()], 1.0))
        if gap == " ":
            pieces += [(" ", 1.0), *statement(rng, fact)]
        else:
            pieces += [(gap, 1.0), *statement(rng, fact)]
        at = spot.start()  # the gap follows the fact too
    return pieces + [(filler[at:], 1.0)]


def passkey(rng: random.Random, filler: str) -> list[tuple[str, float]]:
    """One fact asked for, at any depth; up to three others beside it."""
    if rng.random() < 0.25:
        v = value(rng, "passkey")
        places = [m.end() for m in SPOT.finditer(filler)] or [0]
        at = rng.choice(places)
        return [(filler[:at], 1.0), ("The passkey is", 1.0), (f" {v}", 0.0), (f". Remember it. ", 1.0), (filler[at:], 1.0),
                ("\n\nQuestion: What is the passkey?\nAnswer:", 1.0), (f" {v}", ANSWER), ("\n", 1.0)]
    stated = facts(rng, rng.choice((1, 1, 1, 2, 3, 4)))
    asked = rng.sample(stated, min(len(stated), rng.choice((1, 1, 2))))
    return [*scatter(rng, filler, stated), ("\n\n", 1.0), *turns(rng, asked)]


def key_value(rng: random.Random, filler: str) -> list[tuple[str, float]]:
    """Many facts, many questions; now and then some questions come before the text goes on."""
    most = max(2, min(16, len(filler) // 150))
    stated = facts(rng, rng.randint(2, most))
    count = rng.randint(2, 10)
    if rng.random() < 0.3 and len(stated) >= 4:
        half, cut = len(stated) // 2, filler.find("\n", len(filler) // 2)
        cut = cut if cut > 0 else len(filler) // 2
        return [*scatter(rng, filler[:cut], stated[:half]), ("\n\n", 1.0),
                *turns(rng, rng.sample(stated[:half], min(half, 2))), ("\n", 1.0),
                *scatter(rng, filler[cut:], stated[half:]), ("\n\n", 1.0),
                *turns(rng, [rng.choice(stated) for _ in range(count)])]
    return [*scatter(rng, filler, stated), ("\n\n", 1.0), *turns(rng, [rng.choice(stated) for _ in range(count)])]


def sample_text(rng: random.Random) -> str:
    """A short episode as text, for the tokenizer's training."""
    return "".join(text for text, _ in key_value(rng, " ".join(["The rest is text."] * 40)))
