"""Enum values and their words: JOB_PRIORITY_HIGH of JobPriority is "high"."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from google.protobuf.descriptor import EnumDescriptor


class EnumNames:
    """The words of one enum.

    `words` maps each number to the word that is printed; of aliases the first declared counts. `numbers` maps
    every word that is read (short and full names, aliases too) to its number. `listed` are the words to tell
    people: all but the zero value called UNSPECIFIED.
    """

    def __init__(self, enum: EnumDescriptor) -> None:
        numbers: dict[str, int] = {}
        words: dict[int, str] = {}
        for value in enum.values:
            short = _short(enum.name, value.name)
            numbers[value.name] = numbers[short] = value.number
            words.setdefault(value.number, short)
        self.numbers: Mapping[str, int] = MappingProxyType(numbers)
        self.words: Mapping[int, str] = MappingProxyType(words)
        self.listed: tuple[str, ...] = tuple(
            word for number, word in words.items() if number != 0 or word != "unspecified"
        )


@functools.cache
def enum_names(enum: EnumDescriptor) -> EnumNames:
    """The words of `enum`, made once."""
    return EnumNames(enum)


def enum_words(enum: EnumDescriptor) -> tuple[str, ...]:
    """The words that people use for `enum`, in the order of declaration, without the zero value
    UNSPECIFIED.
    """
    return enum_names(enum).listed


def _short(enum: str, value: str) -> str:
    """`value` in lower case, less the enum's own name: compared without underscores, so that GPUKind fits
    GPU_KIND_ and G_P_U_KIND_ alike.
    """
    wanted = enum.replace("_", "").upper()
    seen = 0
    for index, char in enumerate(value):
        if char == "_":
            if seen == len(wanted) and index + 1 < len(value):
                return value[index + 1 :].lower()
            continue
        if seen >= len(wanted) or char.upper() != wanted[seen]:
            break
        seen += 1
    return value.lower()
