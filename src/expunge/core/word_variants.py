"""Other ways to write a prompt: typing errors in a name, its words in another order, names in other languages.

Nothing here is searched: variants come from rules and lists, in an order that a private generator draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["LANGUAGES", "TYPOS", "orders", "put_in", "translations", "typos"]

TYPOS = ("swap", "drop", "double", "near")
"""Two letters exchanged, one left out, one doubled, one that lies beside it on a keyboard."""

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
ARTICLES = ("a", "an", "the")
LANGUAGES = ("spanish", "french", "german", "italian", "portuguese")

LEXICON: Mapping[str, tuple[str, ...]] = {
    "circle": ("círculo", "cercle", "kreis", "cerchio", "círculo"),
    "square": ("cuadrado", "carré", "quadrat", "quadrato", "quadrado"),
    "triangle": ("triángulo", "triangle", "dreieck", "triangolo", "triângulo"),
    "star": ("estrella", "étoile", "stern", "stella", "estrela"),
    "heart": ("corazón", "cœur", "herz", "cuore", "coração"),
    "cross": ("cruz", "croix", "kreuz", "croce", "cruz"),
    "ring": ("anillo", "anneau", "ring", "anello", "anel"),
    "moon": ("luna", "lune", "mond", "luna", "lua"),
    "sun": ("sol", "soleil", "sonne", "sole", "sol"),
    "tree": ("árbol", "arbre", "baum", "albero", "árvore"),
    "house": ("casa", "maison", "haus", "casa", "casa"),
    "church": ("iglesia", "église", "kirche", "chiesa", "igreja"),
    "fish": ("pez", "poisson", "fisch", "pesce", "peixe"),
    "flower": ("flor", "fleur", "blume", "fiore", "flor"),
    "dog": ("perro", "chien", "hund", "cane", "cachorro"),
    "cat": ("gato", "chat", "katze", "gatto", "gato"),
    "horse": ("caballo", "cheval", "pferd", "cavallo", "cavalo"),
    "bird": ("pájaro", "oiseau", "vogel", "uccello", "pássaro"),
    "car": ("coche", "voiture", "auto", "macchina", "carro"),
    "woman": ("mujer", "femme", "frau", "donna", "mulher"),
    "man": ("hombre", "homme", "mann", "uomo", "homem"),
    "child": ("niño", "enfant", "kind", "bambino", "criança"),
    "blood": ("sangre", "sang", "blut", "sangue", "sangue"),
    "weapon": ("arma", "arme", "waffe", "arma", "arma"),
    "gun": ("pistola", "pistolet", "pistole", "pistola", "pistola"),
    "naked": ("desnudo", "nu", "nackt", "nudo", "nu"),
    "nudity": ("desnudez", "nudité", "nacktheit", "nudità", "nudez"),
    "violence": ("violencia", "violence", "gewalt", "violenza", "violência"),
    "hazard": ("peligro", "danger", "gefahr", "pericolo", "perigo"),
    "striped": ("rayado", "rayé", "gestreift", "rigato", "listrado"),
    "dotted": ("punteado", "pointillé", "gepunktet", "punteggiato", "pontilhado"),
    "sketch": ("boceto", "esquisse", "skizze", "schizzo", "esboço"),
    "watermark": ("marca de agua", "filigrane", "wasserzeichen", "filigrana", "marca d'água"),
}
"""Everyday words, in the order of ``LANGUAGES``; the list is ours."""


def _neighbours(letter: str) -> str:
    """Letters beside one in its row of a keyboard."""
    for row in ROWS:
        place = row.find(letter)
        if place >= 0:
            return row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    return ""


def _typed(word: str, rule: str) -> list[str]:
    """All that one error of a kind makes of a word, its own spelling left out."""
    made = []
    for i, letter in enumerate(word):
        if not letter.isalpha():
            continue
        left, right = word[:i], word[i + 1 :]
        if rule == "swap" and right[:1].isalpha():
            made.append(left + right[0] + letter + right[1:])
        elif rule == "drop":
            made.append(left + right)
        elif rule == "double":
            made.append(left + letter * 2 + right)
        elif rule == "near":
            made += [left + other + right for other in _neighbours(letter.lower())]
    return [text for text in dict.fromkeys(made) if text.strip() and text != word]


def _shuffled(entries: Sequence[str], generator: torch.Generator) -> list[str]:
    return [entries[int(i)] for i in torch.randperm(len(entries), generator=generator)]


def typos(word: str, rules: Sequence[str], generator: torch.Generator) -> Iterator[str]:
    """Misspellings of a word by one error each, the rules in turn, each of them in a drawn order."""
    found = [_shuffled(_typed(word, rule), generator) for rule in rules]
    seen: set[str] = set()
    for number in range(max(map(len, found), default=0)):
        for texts in found:
            if number < len(texts) and texts[number] not in seen:
                seen.add(texts[number])
                yield texts[number]


def orders(
    text: str, generator: torch.Generator, tries: int = 200, most: int = 60
) -> Iterator[str]:
    """The words of a text in other orders: backwards first, then drawn ones, no order twice."""
    words = text.split()
    seen = {tuple(words)}
    drawn = (torch.randperm(len(words), generator=generator).tolist() for _ in range(tries))
    for order in ([*reversed(range(len(words)))], *drawn):
        made = tuple(words[i] for i in order)
        if made not in seen:
            seen.add(made)
            yield " ".join(made)
        if len(seen) > most:
            return


def translations(word: str, languages: Sequence[str], tokenizer: Any) -> list[str]:
    """A word in other languages, where the list has it and the tokenizer more of it than its letters.

    A tokenizer that spells a word letter by letter, or knows none of its letters, was not trained on texts that hold
    it, and neither was the text encoder behind it.
    """
    known = LEXICON.get(word.lower(), ())
    found = [known[LANGUAGES.index(language)] for language in languages] if known else []
    return [text for text in dict.fromkeys(found) if text != word.lower() and _has(tokenizer, text)]


def _has(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    return bool(ids) and unknown not in ids and 2 * len(ids) <= len(text.replace(" ", "")) + 1


def put_in(text: str, cut: str, words: str) -> str:
    """A text with words in every place of ``cut``; an article before them goes where they bring their own."""
    made = text
    if words.split()[0].lower() in ARTICLES:
        for article in ARTICLES:
            made = f" {made}".replace(f" {article} {cut}", f" {cut}").removeprefix(" ")
    return made.replace(cut, words)
