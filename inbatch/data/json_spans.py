"""The places of values in JSON text, read from front to back; each value is parsed to find its end, and let go."""

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class JsonText:
    """The text of a file, read up to `place`, in bytes. ValueError, with its place, for what is not JSON."""

    def __init__(self, data: memoryview):
        # In Latin-1 each byte is a character, so that places in the text are places in the file.
        self._text = str(data, "latin-1")
        self.place = 3 if data[:3] == b"\xef\xbb\xbf" else 0

    def next(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end."""
        space = _SPACE.match(self._text, self.place)
        self.place = space.end() if space else self.place
        return self._text[self.place : self.place + 1]

    def take(self, expected: str) -> str:
        """Move behind the next character and return it; ValueError if it is not one of those expected."""
        mark = self.next()
        if not mark or mark not in expected:
            found = repr(mark) if mark else "the end"
            raise ValueError(f"expected {' or '.join(expected)} at byte {self.place}, found {found}")
        self.place += 1
        return mark

    def value(self) -> tuple[int, int]:
        """Move behind the next value and return where it begins and ends."""
        self.next()
        start = self.place
        try:
            _, self.place = _DECODER.raw_decode(self._text, start)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} at byte {error.pos}") from None
        return start, self.place

    def items(self, opening: str, closing: str) -> Iterator[None]:
        """Yield before each item of the array or object that opens here; the caller moves behind the item."""
        self.take(opening)
        if self.next() == closing:
            self.take(closing)
            return
        mark = ","
        while mark == ",":
            yield
            mark = self.take(f",{closing}")
