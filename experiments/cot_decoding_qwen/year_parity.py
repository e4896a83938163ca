"""Year parity, a task of the CoT-decoding paper: was a well-known person born in an even or an odd year?

The model must recall the year and say whether it is even. The people and their years of birth were written for this
experiment; the questions are made from them.
"""

from __future__ import annotations

import json
from pathlib import Path

from mod_star.atomic_files import write_atomically

FILE = "year_parity.jsonl"
BORN: dict[str, int] = {
    "Isaac Asimov": 1920, "Albert Einstein": 1879, "Marie Curie": 1867, "Charles Darwin": 1809,
    "Abraham Lincoln": 1809, "Wolfgang Amadeus Mozart": 1756, "Ludwig van Beethoven": 1770,
    "Johann Sebastian Bach": 1685, "Leonardo da Vinci": 1452, "Michelangelo": 1475, "William Shakespeare": 1564,
    "Galileo Galilei": 1564, "Vincent van Gogh": 1853, "Pablo Picasso": 1881, "Claude Monet": 1840,
    "Salvador Dalí": 1904, "Frida Kahlo": 1907, "Andy Warhol": 1928, "Rembrandt": 1606, "Johannes Kepler": 1571,
    "Niels Bohr": 1885, "Werner Heisenberg": 1901, "Max Planck": 1858, "Richard Feynman": 1918,
    "Stephen Hawking": 1942, "Carl Sagan": 1934, "Alan Turing": 1912, "Ada Lovelace": 1815, "Nikola Tesla": 1856,
    "Thomas Edison": 1847, "Alexander Graham Bell": 1847, "Louis Pasteur": 1822, "Sigmund Freud": 1856,
    "Karl Marx": 1818, "Friedrich Nietzsche": 1844, "Immanuel Kant": 1724, "Jean-Jacques Rousseau": 1712,
    "Adam Smith": 1723, "Carl Friedrich Gauss": 1777, "Leonhard Euler": 1707, "Benjamin Franklin": 1706,
    "George Washington": 1732, "Thomas Jefferson": 1743, "Napoleon Bonaparte": 1769, "Winston Churchill": 1874,
    "Franklin D. Roosevelt": 1882, "John F. Kennedy": 1917, "Richard Nixon": 1913, "Ronald Reagan": 1911,
    "Jimmy Carter": 1924, "Bill Clinton": 1946, "Barack Obama": 1961, "Nelson Mandela": 1918,
    "Mahatma Gandhi": 1869, "Martin Luther King Jr.": 1929, "Rosa Parks": 1913, "Margaret Thatcher": 1925,
    "Angela Merkel": 1954, "Mikhail Gorbachev": 1931, "Mother Teresa": 1910, "Charles Dickens": 1812,
    "Jane Austen": 1775, "Mark Twain": 1835, "Leo Tolstoy": 1828, "Fyodor Dostoevsky": 1821, "Victor Hugo": 1802,
    "Johann Wolfgang von Goethe": 1749, "Oscar Wilde": 1854, "James Joyce": 1882, "Franz Kafka": 1883,
    "Ernest Hemingway": 1899, "George Orwell": 1903, "Virginia Woolf": 1882, "Agatha Christie": 1890,
    "J. R. R. Tolkien": 1892, "J. K. Rowling": 1965, "Stephen King": 1947, "Charlie Chaplin": 1889,
    "Alfred Hitchcock": 1899, "Walt Disney": 1901, "Steven Spielberg": 1946, "Marilyn Monroe": 1926,
    "Audrey Hepburn": 1929, "Nicolas Cage": 1964, "Tom Hanks": 1956, "Tom Cruise": 1962, "Leonardo DiCaprio": 1974,
    "Elvis Presley": 1935, "John Lennon": 1940, "Paul McCartney": 1942, "Bob Dylan": 1941, "David Bowie": 1947,
    "Freddie Mercury": 1946, "Michael Jackson": 1958, "Madonna": 1958, "Muhammad Ali": 1942, "Pelé": 1940,
    "Michael Jordan": 1963, "Roger Federer": 1981, "Neil Armstrong": 1930,
}  # fmt: skip


def write_questions(directory: Path) -> None:
    """Writes the questions into a directory, made if absent, with the fields `question` and `answer`."""
    lines = [
        json.dumps(
            {"question": f"Was {name} born in an even or odd year?", "answer": "odd" if year % 2 else "even"},
            ensure_ascii=False,
        )
        for name, year in BORN.items()
    ]
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / FILE, ("\n".join(lines) + "\n").encode())
