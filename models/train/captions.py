"""Which emoji the model knows and what each one is called (CLDR short names with an article)."""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")

_WORDS = tomllib.loads((Path(__file__).parent / "config.toml").read_text())["captions"]
_SINGULAR_S = set(_WORDS["singular"])  # plural-looking words that are singular
_BARE = set(_WORDS["bare"])  # names that take no article although they look countable
_BARE_SUBGROUPS = {"zodiac", "math"}
_VOWEL_SOUND = re.compile(r"^(?:[aeio]|u(?!ni|ti|s[ei]|t[ie]|kul)|x-|sos|ng |hour|atm|mx |8)", re.IGNORECASE)
_CONSONANT_SOUND = re.compile(r"^(?:one|ewe|eu|once|unicorn|uni|uk)", re.IGNORECASE)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code point, group, canonical caption and a few synonyms."""

    char: str
    group: str
    subgroup: str
    name: str
    caption: str
    synonyms: tuple[str, ...] = ()


def _clean(name: str) -> str:
    """Normalise a CLDR short name to plain lower-case words."""
    name = name.replace("’", "'").replace("“", '"').replace("”", '"').lower()
    name = name.replace("person: ", "person with ").replace("man: ", "man with ")
    return name.replace("with beard", "with a beard").replace('"', "")


def with_article(name: str, subgroup: str = "") -> str:
    """Put "a"/"an" before a countable singular name; leave plurals and mass nouns bare."""
    head = re.split(r" (?:with|of|in|on|without|showing|facing|behind|pointing|at|for|from|\w+ing) ", name)[0]
    last = head.split()[-1]
    plural = last.endswith("s") and last not in _SINGULAR_S and not last.endswith(("ss", "us"))
    plural = plural or head.split()[0] in {"people", "men", "women", "palms", "two"}
    clock = "o'clock" in name or name.endswith("-thirty")
    if (
        plural
        or clock
        or name in _BARE
        or subgroup in _BARE_SUBGROUPS
        or name.startswith(("1st", "2nd", "3rd", "thumbs"))
    ):
        return name
    an = _VOWEL_SOUND.match(name) and not _CONSONANT_SOUND.match(name)
    return f"{'an' if an else 'a'} {name}"


def load_emoji() -> list[Emoji]:
    """All single-code-point emoji that have an English name, in Unicode's order, captions unique."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for node in ET.parse(ANNOTATIONS).getroot().iter("annotation"):
        char, text = node.get("cp", ""), (node.text or "").strip()
        if node.get("type") == "tts":
            names[char] = text
        else:
            keywords[char] = [_clean(word.strip()) for word in text.split("|")]
    found: list[Emoji] = []
    seen: set[str] = set()
    group = subgroup = ""
    for line in EMOJI_TEST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            points = [p for p in line.split(";")[0].split() if p != "FE0F"]
            char = chr(int(points[0], 16))
            if len(points) != 1 or char not in names:
                continue
            name = _clean(names[char])
            caption = with_article(name, subgroup)
            if caption in seen:
                raise ValueError(f"two emoji share the caption {caption!r}")
            seen.add(caption)
            found.append(Emoji(char, group, subgroup, name, caption, tuple(keywords.get(char, []))))
    return _keep_unambiguous_synonyms(found)


def _keep_unambiguous_synonyms(emoji: list[Emoji]) -> list[Emoji]:
    """Keep only keywords that point to one emoji; an ambiguous one would teach a blend of several."""
    owners: dict[str, int] = {}
    for item in emoji:
        for word in {*item.synonyms, item.name}:
            owners[word] = owners.get(word, 0) + 1
    names = {item.name for item in emoji}
    kept = []
    for item in emoji:
        good = [w for w in item.synonyms if owners[w] == 1 and w not in names and 2 < len(w) <= 24]
        synonyms = tuple(with_article(w, item.subgroup) for w in good[:4])
        kept.append(Emoji(item.char, item.group, item.subgroup, item.name, item.caption, synonyms))
    return kept
