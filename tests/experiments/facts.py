"""Which pairs about facts teach neither to deny nor to agree? Those that onepass.py trains on.

A fact of the table gives two questions: one with a true premise, and one with a false premise, in
which the value is that of another fact. In each pair the rejected answer is right and the chosen
one wrong, as in the official hallucination data. So half of the chosen answers say yes and half say
no, and half of the premises are true. No fact is asked for in real/true_premises.txt, which
measures.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Pair


class Kind(NamedTuple):
    """Facts of one kind; {key} and {value} stand in its sentences."""

    question: str
    yes: str
    no: str
    table: str  # "key: value" in each line


KINDS = [
    Kind(
        "Is {value} the capital of {key}?",
        "Yes, {value} is the capital of {key}.",
        "No, {value} is not the capital of {key}.",
        """Poland: Warsaw
        Norway: Oslo
        Sweden: Stockholm
        Finland: Helsinki
        Denmark: Copenhagen
        Austria: Vienna
        Hungary: Budapest
        Ireland: Dublin
        Belgium: Brussels
        Romania: Bucharest
        Bulgaria: Sofia
        Turkey: Ankara
        Egypt: Cairo
        Kenya: Nairobi
        Morocco: Rabat
        Ghana: Accra
        Ethiopia: Addis Ababa
        Peru: Lima
        Chile: Santiago
        Argentina: Buenos Aires
        Colombia: Bogota
        Cuba: Havana
        Venezuela: Caracas
        Ecuador: Quito
        Uruguay: Montevideo
        India: New Delhi
        China: Beijing
        Thailand: Bangkok
        Vietnam: Hanoi
        South Korea: Seoul
        Iran: Tehran
        Iraq: Baghdad
        Russia: Moscow
        Ukraine: Kyiv
        Australia: Canberra
        New Zealand: Wellington
        Nepal: Kathmandu
        Mongolia: Ulaanbaatar
        the Philippines: Manila
        Iceland: Reykjavik
        Croatia: Zagreb
        Serbia: Belgrade
        the Czech Republic: Prague
        Slovakia: Bratislava
        Jordan: Amman
        Lebanon: Beirut""",
    ),
    Kind(
        "Is {value} the chemical symbol for {key}?",
        "Yes, {value} is the chemical symbol for {key}.",
        "No, {value} is not the chemical symbol for {key}.",
        """silver: Ag
        iron: Fe
        copper: Cu
        lead: Pb
        tin: Sn
        sodium: Na
        potassium: K
        helium: He
        neon: Ne
        calcium: Ca
        zinc: Zn
        nickel: Ni
        mercury: Hg
        tungsten: W
        uranium: U
        nitrogen: N
        carbon: C
        hydrogen: H
        aluminium: Al
        chlorine: Cl""",
    ),
    Kind(
        "Is {key} a country in {value}?",
        "Yes, {key} is a country in {value}.",
        "No, {key} is not a country in {value}.",
        """Nigeria: Africa
        Bolivia: South America
        Laos: Asia
        Latvia: Europe
        Zambia: Africa
        Paraguay: South America
        Malaysia: Asia
        Estonia: Europe
        Tunisia: Africa
        Guyana: South America
        Pakistan: Asia
        Switzerland: Europe
        Angola: Africa
        Brazil: South America
        Bangladesh: Asia
        Albania: Europe""",
    ),
    Kind(
        "Is the {value} the currency of {key}?",
        "Yes, the {value} is the currency of {key}.",
        "No, the {value} is not the currency of {key}.",
        """Japan: yen
        India: rupee
        Russia: ruble
        China: yuan
        Switzerland: franc
        Poland: zloty
        Hungary: forint
        Sweden: krona
        Mexico: peso
        Brazil: real
        Thailand: baht
        South Korea: won
        Israel: shekel
        Vietnam: dong
        South Africa: rand
        Turkey: lira""",
    ),
    Kind(
        "Is a young {key} called a {value}?",
        "Yes, a young {key} is called a {value}.",
        "No, a young {key} is not called a {value}.",
        """dog: puppy
        cat: kitten
        horse: foal
        sheep: lamb
        goat: kid
        pig: piglet
        deer: fawn
        bear: cub
        goose: gosling
        duck: duckling
        swan: cygnet
        frog: tadpole
        kangaroo: joey
        chicken: chick
        hare: leveret
        cow: calf""",
    ),
    Kind(
        "Did {value} write '{key}'?",
        "Yes, {value} wrote '{key}'.",
        "No, {value} did not write '{key}'.",
        """Don Quixote: Miguel de Cervantes
        War and Peace: Leo Tolstoy
        Pride and Prejudice: Jane Austen
        Oliver Twist: Charles Dickens
        Moby Dick: Herman Melville
        Crime and Punishment: Fyodor Dostoevsky
        Animal Farm: George Orwell
        Frankenstein: Mary Shelley
        Dracula: Bram Stoker
        Faust: Johann Wolfgang von Goethe
        Ulysses: James Joyce
        The Hobbit: J. R. R. Tolkien
        Les Miserables: Victor Hugo
        The Divine Comedy: Dante Alighieri
        The Time Machine: H. G. Wells
        Robinson Crusoe: Daniel Defoe
        Treasure Island: Robert Louis Stevenson
        Jane Eyre: Charlotte Bronte
        The Metamorphosis: Franz Kafka
        Around the World in Eighty Days: Jules Verne""",
    ),
    Kind(
        "Did {value} paint '{key}'?",
        "Yes, {value} painted '{key}'.",
        "No, {value} did not paint '{key}'.",
        """Guernica: Pablo Picasso
        The Starry Night: Vincent van Gogh
        The Scream: Edvard Munch
        Girl with a Pearl Earring: Johannes Vermeer
        The Night Watch: Rembrandt
        The Birth of Venus: Sandro Botticelli
        Water Lilies: Claude Monet
        The Persistence of Memory: Salvador Dali
        The Kiss: Gustav Klimt""",
    ),
    Kind(
        "Does the {key} flow through {value}?",
        "Yes, the {key} flows through {value}.",
        "No, the {key} does not flow through {value}.",
        """Seine: Paris
        Tiber: Rome
        Spree: Berlin
        Vltava: Prague
        Potomac: Washington
        Liffey: Dublin
        Hudson: New York
        Neva: Saint Petersburg
        Moskva: Moscow
        Tagus: Lisbon
        Manzanares: Madrid
        Vistula: Warsaw""",
    ),
]


def rows(kind):
    """[(key, value)] of a kind's table."""
    return [tuple(line.strip().split(": ")) for line in kind.table.splitlines()]


def balanced_pairs():
    """Two Pairs for each fact: of its true premise, then of its false one."""
    pairs = []
    for kind in KINDS:
        facts = rows(kind)
        for i, (key, value) in enumerate(facts):
            following = [other for _, other in facts[i + 1 :] + facts[:i]]
            wrong = next(other for other in following if other != value)
            for said, right, false in ((value, kind.yes, kind.no), (wrong, kind.no, kind.yes)):
                texts = [text.format(key=key, value=said) for text in (kind.question, false, right)]
                pairs.append(Pair(*texts))
    return pairs
