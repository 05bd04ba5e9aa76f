"""From a record, in any of the usual column conventions, to an ``Example``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from inbatch.data.lines import Where
from inbatch.data.records import ID_NAMES, Example, Passage, normalised

QUERY_NAMES = ("query", "question", "anchor")
QUERY_ID_NAMES = ("query_id", "question_id")
POSITIVE_NAMES = ("positive", "pos", "pos_doc", "positive_passages")
_NEGATIVE = re.compile(r"neg|neg_doc|negative_passages|negative(_(\d+))?")
CONVENTIONS = (
    "anchor, positive, negative[_1.._n] (sentence-transformers); query, pos, neg (FlagEmbedding); "
    "question or query, pos_doc, neg_doc (NeMo); query_id, query, positive_passages, negative_passages (Tevatron)"
)
FIELDS = ("query", "query_id", "positive", "negative", "corpus")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a record hold what; ``negatives=None`` takes each record's own by their usual names."""

    query: str
    positive: str
    query_id: str | None = None
    negatives: tuple[str, ...] | None = None
    corpus: str = "corpus_id"

    def used(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that an example is made of."""
        negatives = set(self.negatives_in(names))
        single = {self.query, self.positive, self.query_id, self.corpus}
        return [name for name in names if name in single or name in negatives]

    def negatives_in(self, names: Iterable[str]) -> Sequence[str]:
        if self.negatives is not None:
            return self.negatives
        found = [match for match in map(_NEGATIVE.fullmatch, names) if match]
        return [match[0] for match in sorted(found, key=lambda match: int(match[2] or 0))]


def find_columns(names: Sequence[str], given: Mapping[str, str | Sequence[str]] | None, where: Where) -> Columns:
    """The columns among ``names``: those ``given`` (our field -> column), the others by their usual names.

    Raises ValueError where a given column or our field does not exist, or the usual names leave none or several.
    """
    given = given or {}
    for field, value in given.items():
        wanted = [value] if isinstance(value, str) else list(value)
        if field not in FIELDS:
            raise ValueError(f"columns has the unknown field {field!r}: the fields are {list(FIELDS)}")
        if len(wanted) != 1 and field != "negative":
            raise ValueError(f"columns[{field!r}] must name one column, got {value!r}")
        for name in wanted:
            if name not in names:
                raise ValueError(f"{where()}: columns names {name!r} for {field!r}, but the columns are {list(names)}")

    def one(field: str, usual: Sequence[str], *, needed: bool) -> str | None:
        if field in given:
            value = given[field]
            return value if isinstance(value, str) else value[0]
        found = [name for name in usual if name in names]
        if len(found) > 1 or (needed and not found):
            problem = f"several could be the {field}: {found}" if found else f"none is known to be the {field}"
            raise ValueError(
                f"{where()}: of the columns {list(names)} {problem}. Known conventions: {CONVENTIONS}. "
                f"Name it yourself: columns: {{{field}: <column>}}."
            )
        return found[0] if found else None

    negative = given.get("negative")
    query, positive = one("query", QUERY_NAMES, needed=True), one("positive", POSITIVE_NAMES, needed=True)
    assert query is not None
    assert positive is not None
    return Columns(
        query=query,
        positive=positive,
        query_id=one("query_id", QUERY_ID_NAMES, needed=False),
        negatives=(negative,) if isinstance(negative, str) else negative if negative is None else tuple(negative),
        corpus=one("corpus", ("corpus_id",), needed=False) or "corpus_id",
    )


def example_from(record: object, columns: Columns, corpus: str, where: Where) -> tuple[Example, bool]:
    """The example of an inline record, and whether a negative that equals a positive was left out of it."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where()}: expected an object with named columns, found {type(record).__name__}")
    positives = _passages(record.get(columns.positive), columns.positive, where)
    if not positives:
        raise ValueError(
            f"{where()}: the record has no positive: its {columns.positive!r} is missing or empty. Expected at least "
            "one text: complete the record or delete it."
        )
    names = columns.negatives_in(record)
    negatives = [passage for name in names for passage in _passages(record.get(name), name, where)]
    kept = without_positives(positives, negatives)
    example = Example(
        query=query_text(record.get(columns.query), columns.query, where),
        query_id=None if columns.query_id is None else id_text(record.get(columns.query_id), columns.query_id, where),
        positives=tuple(positives),
        negatives=tuple(kept),
        corpus=id_text(record.get(columns.corpus), columns.corpus, where) or corpus,
    )
    return example, len(kept) < len(negatives)


def without_positives(positives: Sequence[Passage], negatives: Sequence[Passage]) -> list[Passage]:
    """The negatives that equal no positive, neither in text nor in id."""
    if not negatives:
        return []
    texts = {normalised(passage.full_text) for passage in positives}
    ids = {passage.doc_id for passage in positives} - {None}
    return [p for p in negatives if p.doc_id not in ids and normalised(p.full_text) not in texts]


def query_text(value: object, name: str, where: Where) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where()}: expected the query's text in {name!r}, found {_show(value)}")
    return value


def id_text(value: object, name: str, where: Where) -> str | None:
    """An id as a string; None and "" are no id."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{where()}: expected an id (a string or an integer) in {name!r}, found {_show(value)}")
    return str(value)


def _passages(value: object, name: str, where: Where) -> list[Passage]:
    """A text, an object {text, title?, id?}, or a list of these. Empty texts and nulls stand for nothing."""
    if value is None:
        return []
    if isinstance(value, str):
        return [Passage(value)] if value.strip() else []
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):
            raise ValueError(f"{where()}: expected texts or objects in the list {name!r}, found a list within it")
        return [passage for item in value for passage in _passages(item, name, where)]
    if isinstance(value, Mapping):
        text, title = value.get("text"), value.get("title") or ""
        if isinstance(text, str) and isinstance(title, str):
            key = next((key for key in ID_NAMES if value.get(key) not in (None, "")), None)
            doc_id = None if key is None else id_text(value[key], key, where)
            return [Passage(text, title, doc_id)] if text.strip() or title.strip() else []
    raise ValueError(
        f"{where()}: expected in {name!r} a text, an object {{text, title, id}} or a list of these, found "
        f"{_show(value)}. Documents given by id alone need a JSON file that names their corpus folder: "
        "{corpus: [{path}], data: [...]}."
    )


def _show(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
