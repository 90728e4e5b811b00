"""What `re` does not know of letters."""

import unicodedata

MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
"""Vowel signs and accents that stand by themselves: they are no letters to `re`, but they belong to the word."""
