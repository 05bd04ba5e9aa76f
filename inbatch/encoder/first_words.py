"""Long texts cut to their first words before they are tokenised: most of the time goes into tokens dropped again.

The first words have the tokens that they have within the whole text if two things hold, and both are asked:

1. The tokenizer splits at blanks, so that no token holds parts of two words. Byte-level BPE without its regex and what
   SentencePiece leaves without a pre-tokenizer may merge across them.
2. No token that is kept belongs to the last word: what stood behind it may have changed its tokens (".\\n" can be one).

Words are what " \\t\\n\\r" separate, and not all that str.split() does: normalisers delete control characters, some of
which it splits at, and the words on either side become one.
"""

import re
from itertools import product

from transformers import BatchEncoding, PreTrainedTokenizerBase

BLANKS = " \t\n\r"
# Every ordered pair of a letter, a digit and what the usual pre-tokenizers join with a neighbour or a line break.
_PROBE = [word for pair in product("a1./'-_#", repeat=2) for word in pair]


def splits_at_blanks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether no pre-token has characters from both sides of a blank. False where it cannot be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return False
    if any(len(token.content.split()) > 1 for token in tokenizer.added_tokens_decoder.values()):
        return False
    for blank in BLANKS:
        text = blank.join(_PROBE)
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        for _, (start, stop) in backend.pre_tokenizer.pre_tokenize_str(text):
            if sum(character in _PROBE for character in text[start:stop]) > 1:
                return False
    return True


def first_words(text: str, count: int) -> tuple[str, int]:
    """The text cut behind its first `count` words and one more, and where that one starts; the text's end if uncut."""
    if len(text) > 2 * count:  # else there cannot be as many
        # One word more must hold something that no tokenizer takes for a blank, or the gap before it would be cut.
        match = re.match(rf"[{BLANKS}]*(?:[^{BLANKS}]+[{BLANKS}]+){{{count}}}([^{BLANKS}]*?\S[^{BLANKS}]*)", text)
        if match is not None and match.end() < len(text):
            return match[0], match.start(1)
    return text, len(text)


def holds_last_word(tokens: BatchEncoding, row: int, start: int, stop: int) -> bool:
    """Whether some token of a row is of its text's characters from start to stop."""
    return any(tokens.char_to_token(row, place) is not None for place in range(start, stop))
