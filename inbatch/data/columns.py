"""The columns of a record: one table of the names that the field uses, and readers of their content."""

import json
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from reprlib import Repr
from typing import Any

import numpy as np

from inbatch.data.lines import Where
from inbatch.data.records import Passage

GivenColumns = Mapping[str, str | Sequence[str]]
Roles = Mapping[str, tuple[str, ...]]

_DOCS = "docs?|documents?|passages?"
_NEGATIVE = f"neg(ative)?s?(_({_DOCS}|ctxs?|contexts?|texts?|messages|list))?(_?[0-9]+)?"
# role: patterns of its columns' names, the preferred first. Names are compared as `_plain` makes them.
EXAMPLE: Roles = {
    "query": ("query|question|anchor|query_text|question_text|messages",),
    "query_id": ("query_id", "question_id", "qid"),
    "positive": (f"pos(itive)?s?(_({_DOCS}|ctxs?|contexts?|texts?|messages|list))?(_?[0-9]+)?|response",),
    "positive_ids": (f"pos(itive)?_(({_DOCS})_?)?ids?",),
    "negative": (
        f"(hard|mined)_{_NEGATIVE}",
        f"{_NEGATIVE}|(bm25|dense|random|easy)_{_NEGATIVE}|rejected_(response|messages)",
    ),
    "negative_ids": (f"(hard_)?neg(ative)?_(({_DOCS})_?)?ids?",),
    # A teacher's, of the positives and the negatives: FlagEmbedding's lists, or one list of both.
    "positive_scores": ("pos(itive)?s?_scores",),
    "negative_scores": ("(hard_)?neg(ative)?s?_scores",),
    "scores": ("(teacher_)?scores?|labels?",),
    "prompt": ("prompt",),
    "corpus": ("corpus_id",),
}
# Names of a query and its positive where a record has no column of the names above: (query, positive). The usual names
# of a query come first.
_PAIRS = tuple(
    (re.compile(query), re.compile(positive))
    for query, positive in (
        (EXAMPLE["query"][0], "answer|document|doc|passage|context"),
        ("sentence_?1", "sentence_?2"),
        ("sentence_?a", "sentence_?b"),
        ("text_?1", "text_?2"),
        ("question_?1", "question_?2"),
        ("premise", "hypothesis"),
    )
)
# Beside a pair these say whether its second text is a positive at all.
_LABEL = re.compile(
    "(gold_|(relatedness|similarity)_)?(labels?|scores?)|similarity|(is_)?duplicate|relevance|rel|grade"
)
DOCUMENT: Roles = {
    "id": (
        "_id",
        "id",
        "pid",
        "docid",
        "doc_id",
        "document_id",
        "passage_id",
        "psg_id",
        "qid",
        "query_id",
        "question_id",
    ),
    "text": ("text", "contents?", "passage", "document", "body", "query", "query_text", "question"),
    "title": ("title",),
}
JUDGEMENT: Roles = {
    "query": ("query_id", "qid", "topic_id", "topic", "query", "question_id"),
    "document": ("corpus_id", "doc_id", "docid", "document_id", "pid", "passage_id", "document", "doc"),
    "score": ("score", "relevance", "rel", "label", "grade", "judge?ment"),
}
CONVENTIONS = (
    "anchor, positive, negative[_1.._n] (sentence-transformers); query, pos, neg, prompt (FlagEmbedding); question or "
    "query, pos_doc, neg_doc (NeMo); query_id, query, positive_passages, negative_passages, or query_text, "
    "positive_document_ids, negative_document_ids (Tevatron); question, positive_ctxs, negative_ctxs (DPR); messages, "
    "positive_messages, negative_messages (ms-swift)"
)
_MOST = 100  # names kept for messages, whatever number a malformed file has
_short = Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


class Columns:
    """The columns of one source by role: those that the caller gave, the others by their usual names.

    Roles are found record by record, since some files say `query` in one line and `question` in the next. A given
    column has its role in the records that have it. `unread` collects the columns with content and no role.
    """

    def __init__(self, roles: Roles, given: GivenColumns | None = None):
        self._patterns = [(role, re.compile(f"(?:{name})")) for role, names in roles.items() for name in names]
        self.given = {
            field: [value] if isinstance(value, str) else list(value) for field, value in (given or {}).items()
        }
        for field, names in self.given.items():
            if field not in roles:
                raise ValueError(f"columns has the unknown field {field!r}: the fields are {list(roles)}")
            if len(names) != 1 and field != "negative":
                raise ValueError(f"columns[{field!r}] must name one column, got {names}")
        self._layouts: dict[tuple, dict[str, list[Any]]] = {}
        self.plain: dict[tuple, Any] = {}  # by layout, for the reader
        # By column: those of the objects {id, title, text} within it.
        self.nested: dict[str, Columns] = defaultdict(lambda: Columns(DOCUMENT))
        self._present: set[str] = set()
        self._instead: dict[str, str] = {}  # role: where a record has another column than the given one
        self.roles: dict[str, str] = {}
        self.unread: dict[str, None] = {}

    def layout(self, record: Mapping) -> dict[str, list[Any]]:
        """Return the record's columns by role, and under "" those without a role."""
        names = tuple(record)
        layout = self._layouts.get(names)
        if layout is None:
            if len(self._layouts) == _MOST:
                self._layouts.clear()
                self.plain.clear()
            layout = self._layouts[names] = self._arrange(names)
        for name in layout[""]:
            if str(name) not in self.unread and not empty(record[name]):
                self.leave([name])
        return layout

    def wanted(self, names: Sequence[str], source: str) -> list[str]:
        """Return the columns of a header that have a role, and note the others; ValueError if there are none."""
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{source}: the columns {listed(repeated)} stand there twice: rename or drop one")
        rest = self._arrange(tuple(names))[""]
        if len(rest) == len(names):
            raise ValueError(
                f"{source}: of the columns {listed(rest)} none is known. Known conventions: {CONVENTIONS}. Name them "
                "yourself: columns: {<field>: <column>}."
            )
        self.leave(rest)
        return [name for name in names if name not in rest]

    def knows(self, names: Sequence[str]) -> bool:
        """Return True if a column has a role by its usual or its given name."""
        return len(self._arrange(tuple(names))[""]) < len(names)

    def all_unread(self) -> list[str]:
        """Return the names of all columns with content and no role, those within others as a.b."""
        return [*self.unread, *(f"{name}.{inner}" for name, part in self.nested.items() for inner in part.unread)]

    def check_given(self) -> None:
        """Raise ValueError if some records have a given column and others another column for its role."""
        for role, where in self._instead.items():
            if self._present.intersection(self.given[role]):
                raise ValueError(
                    f"{where}: the record lacks {self.given[role][0]!r}, which columns names for the {role}: complete "
                    "it, or leave `columns` out if the usual names do"
                )

    def missing(self) -> dict[str, str]:
        """Return the given columns (name -> field) that no record had."""
        return {name: field for field, names in self.given.items() for name in names if name not in self._present}

    def one_of(self, record: Mapping, role: str, where: Where) -> list[Any]:
        """Return the columns that hold the query or the positive: one, or a numbered series (positive_1, positive_2).

        The column may be empty, or missing in this record. ValueError if none is known, or several are filled.
        """
        names = self.layout(record)[role] or [name for name, known in self.roles.items() if known == role][:1]
        full = [name for name in names if not empty(record.get(name))]
        if full and role in self.given and self.given[role] != full:
            self._instead.setdefault(role, where())
        if labels := self.layout(record)["label"]:
            pair = "query: <column>, positive: <column>"
            raise ValueError(
                f"{where()}: {listed(labels)} may mark pairs that are not positive. Keep the positive pairs alone, "
                f"without that column, or name the columns yourself, by columns: {{{pair}}}, and all pairs count."
            )
        if not names or len({re.sub(r"_?[0-9]+$", "", str(name)) for name in full}) > 1:
            problem = f"several could be the {role}: {listed(full)}" if names else f"none is known to be the {role}"
            raise ValueError(
                f"{where()}: of the columns {listed(list(record))} {problem}. Known conventions: {CONVENTIONS}. "
                f"Name it yourself: columns: {{{role}: <column>}}."
            )
        return full or names[:1]

    def leave(self, names: Sequence[Any]) -> None:
        """Note columns that are not read."""
        for name in names[: max(0, _MOST - len(self.unread))]:
            self.unread[str(name)] = None

    def seen(self) -> np.ndarray:
        """Return the findings so far as bytes, for `learn` in another process."""
        nested = {name: columns.unread for name, columns in self.nested.items()}
        seen = {"roles": self.roles, "unread": self.unread, "present": sorted(self._present)}
        seen |= {"instead": self._instead, "nested": nested}
        return np.frombuffer(json.dumps(seen).encode() + b"\n", np.uint8)

    def learn(self, seen: np.ndarray) -> None:
        """Add the findings of other processes, which follow one another in `seen`."""
        for line in seen.tobytes().splitlines():
            other = json.loads(line)
            self.roles |= other["roles"]
            self.unread |= other["unread"]
            self._present.update(other["present"])
            self._instead = other["instead"] | self._instead
            for name, unread in other["nested"].items():
                self.nested[name].unread |= unread

    def _usual(self, name: Any) -> tuple[int, str] | None:
        """Return the first pattern, as (its place in the table, its role), that a name matches."""
        plain = _plain(name)
        return next(((place, role) for place, (role, p) in enumerate(self._patterns) if p.fullmatch(plain)), None)

    def _arrange(self, names: tuple) -> dict[str, list[Any]]:
        by_role: dict[str, list[Any]] = {role: [] for role, _ in self._patterns}
        given = {field: [name for name in wanted if name in names] for field, wanted in self.given.items()}
        by_role.update({field: present for field, present in given.items() if present})
        self._present.update(*given.values())
        named = {name for present in by_role.values() for name in present}
        usual = [(place, _number(name), name) for name in names if name not in named and (place := self._usual(name))]
        for (_, role), _, name in sorted(usual, key=lambda match: (match[0][0], match[1])):
            # An optional role takes one column; the query and the positive may be in any of several.
            if not given.get(role) and (not by_role[role] or role in ("query", "positive", "negative")):
                by_role[role].append(name)
                named.add(name)
        if "positive" in by_role and not (by_role["positive"] or by_role["positive_ids"]):
            _pair(names, by_role)
            named.update(name for present in by_role.values() for name in present)
        if len(self.roles) < _MOST:
            self.roles |= {str(name): role for role, present in by_role.items() for name in present}
        return {"label": []} | by_role | {"": [name for name in names if name not in named]}


def _pair(names: tuple, by_role: dict[str, list[Any]]) -> None:
    """Find a query and its positive by names of pairs, and the labels beside them."""
    for query, positive in _PAIRS:
        first = [name for name in by_role["query"] or names if query.fullmatch(_plain(name))]
        second = [name for name in names if positive.fullmatch(_plain(name))]
        if first and second:
            labels = [name for name in names if _LABEL.fullmatch(_plain(name))]
            by_role.update({"query": first, "positive": second, "label": labels})
            return


def _plain(name: Any) -> str:
    """Return a name in lower case, with _ for spaces, hyphens and between the words of camelCase."""
    return re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", str(name).strip()).lower()


def _number(name: Any) -> int:
    digits = re.search(r"[0-9]+$", str(name))
    return int(digits[0][:9]) if digits else 0


def empty(value: object) -> bool:
    """Return True for null, and for a text, list or object without content."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def notice(message: str) -> None:
    """Warn, in the name of the first caller outside this package."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("inbatch."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)


def not_read(source: str, names: Sequence[str], advice: str = "") -> None:
    """Name in one line the parts of a source that are not read, if any."""
    if names:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        notice(f"{source}: not read: {', '.join(map(_short.repr, names[:20]))}{more}{advice}")


def id_text(value: object, name: str, where: Where) -> str | None:
    """Return an id as a string; None for null and ""."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{where()}: expected an id (a string or an integer) in {name!r}, found {show(value)}")
    return str(value)


def text_of(value: object) -> str | None:
    """Return a text, also that of a conversation of one message [{role, content}]; None for anything else."""
    if isinstance(value, list) and len(value) == 1 and is_conversation(value):
        value = value[0]["content"]
    return value if isinstance(value, str) else None


def is_conversation(value: object) -> bool:
    """Return True for a list of messages {role, content}."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    )


def passages(value: object, name: str, columns: Columns, where: Where) -> list[Passage]:
    """Read a text, an object {text, title, id}, a conversation of one message, or a list of these.

    Empty texts and nulls are left out.
    """
    if value is None:
        return []
    if (text := text_of(value)) is not None:
        return [Passage(text)] if text.strip() else []
    if isinstance(value, list) and not is_conversation(value):
        if any(isinstance(item, list) and not is_conversation(item) for item in value):
            raise ValueError(f"{where()}: expected texts or objects in the list {name!r}, found a list within it")
        return [passage for item in value for passage in passages(item, name, columns, where)]
    if isinstance(value, Mapping):
        passage = _document(value, columns.nested[name], where)
        if passage is not None:
            return [passage] if passage.full_text.strip() else []
    raise ValueError(
        f"{where()}: expected in {name!r} a text, an object {{text, title, id}}, one message {{role, content}} or a "
        f"list of these, found {show(value)}. Documents given by id alone need a JSON file that names their corpus "
        "folder, {corpus: [{path}], data: [...]}, or a column positive_document_ids and a corpus beside the records."
    )


def document(record: object, columns: Columns, where: Where, *, needs_id: bool = True) -> Passage:
    """Read a record {id, text, title} of a corpus or of queries; a null text is an empty one."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where()}: expected an object with an id and a text, found {type(record).__name__}")
    passage = _document(record, columns, where)
    if passage is None or (needs_id and passage.doc_id is None):
        ids = ", ".join(DOCUMENT["id"])
        described = ", ".join(f"{str(name)[:80]}: {type(value).__name__}" for name, value in list(record.items())[:20])
        raise ValueError(
            f"{where()}: expected an id ({ids}), a string `text` and optionally a string `title`, found {{{described}}}"
        )
    return passage


def _document(record: Mapping, columns: Columns, where: Where) -> Passage | None:
    layout = columns.layout(record)
    text, title, key = (next(iter(layout[role]), None) for role in ("text", "title", "id"))
    content, heading = ("" if name is None or record[name] is None else record[name] for name in (text, title))
    if text is None or not isinstance(content, str) or not isinstance(heading, str):
        return None
    return Passage(content, heading, None if key is None else id_text(record[key], str(key), where))


def one_line(error: BaseException) -> str:
    """Return the text of an error, or its class where it has none, in one line, for messages."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


def listed(names: Sequence[Any]) -> str:
    """Return the first names of a list, each cut to a length that fits a message."""
    return f"[{', '.join(map(_short.repr, names[:20]))}{', ...' if len(names) > 20 else ''}]"


def show(value: object) -> str:
    """Return any value, however large or deep, in one short line, for messages."""
    return f"{type(value).__name__} {_short.repr(value if isinstance(value, str) else str(_short.repr(value)))}"
