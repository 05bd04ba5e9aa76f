"""The places of the elements in a large JSON array or object, so that only the element in use is held."""

import json
import re
from collections.abc import Iterator

# A string is one token. Group 1 is its end, and is empty if the string does not end or has more escapes than the engine
# should hold. Commas matter at one level alone.
_ESCAPES = rb'[^"\\]*(?:\\.[^"\\]*){0,999}'
_STRING = rb'"' + _ESCAPES + rb'("?)'
_MARKS = re.compile(_STRING + rb"|[\[\]{},]", re.DOTALL)
_BRACKETS = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)
_REST = re.compile(_ESCAPES + rb'("?)', re.DOTALL)
_KEY = re.compile(rb'\s*("' + _ESCAPES + rb'")\s*:', re.DOTALL)
_QUOTE, _COMMA, _OPENING, _CLOSING = ord('"'), ord(","), tuple(b"[{"), tuple(b"]}")
_DEEPEST = 200


def elements(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each element, or "key": value, of the array or object from `start` to `end`.

    ValueError if something follows it, brackets do not match, a string does not end, an element is missing, or nesting
    is absurd. The content of elements is not checked.
    """
    closing = _CLOSING[_OPENING.index(data[start])]
    begin = place = start + 1
    count = 0
    while mark := _MARKS.search(data, place):
        kind, place = data[mark.start()], mark.end()
        if kind == _QUOTE:
            place = _string_end(data, mark)
        elif kind in _OPENING:
            place = end_of(data, mark.start())
        else:
            missing = not bytes(data[begin : mark.start()]).strip()
            if kind not in (_COMMA, closing) or (missing and (kind == _COMMA or count)):
                raise ValueError(f"{chr(kind)!r} is not expected at byte {mark.start()}")
            if not missing:
                yield begin, mark.start()
            if kind == closing:
                if bytes(data[place:end]).strip():
                    raise ValueError(f"something follows at byte {place}")
                return
            count += 1
            begin = place
    raise ValueError(f"what opens at byte {start} does not end")


def members(data: memoryview, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Return where the values of the object from `start` to `end` lie, by key."""
    places: dict[str, tuple[int, int]] = {}
    for begin, stop in elements(data, start, end):
        key = _KEY.match(data, begin, stop)
        if not key:
            raise ValueError(f"a key and a colon are expected at byte {begin}")
        name = json.loads(key[1])
        if name in places:
            raise ValueError(f"the key {name!r} stands twice")
        places[name] = key.end(), stop
    return places


def end_of(data: memoryview, start: int) -> int:
    """Return the place after the array or object that opens at `start`."""
    depth, place = 0, start
    while mark := _BRACKETS.search(data, place):
        kind, place = data[mark.start()], mark.end()
        if kind == _QUOTE:
            place = _string_end(data, mark)
        elif kind in _OPENING:
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} brackets lie within one another at byte {mark.start()}")
        else:
            depth -= 1
            if not depth:
                return place
    raise ValueError(f"what opens at byte {start} does not end")


def _string_end(data: memoryview, string: re.Match[bytes]) -> int:
    """Return the place after the string that `string` begins."""
    part: re.Match[bytes] | None = string
    while part and not part[1]:
        if part.end() == len(data) or part.end() == part.start():
            raise ValueError(f"the string at byte {string.start()} does not end")
        part = _REST.match(data, part.end())
    assert part is not None, "the rest of a string matches whatever follows"
    return part.end()
