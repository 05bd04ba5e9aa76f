"""A report of what was recognised in a source: the command `inbatch data`."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from inbatch.data.columns import EXAMPLE, Columns, GivenColumns
from inbatch.data.corpus import open_corpus
from inbatch.data.judged import is_judged, open_judged, qrels_files
from inbatch.data.readers import Source, open_examples
from inbatch.data.records import Example
from inbatch.data.tables import open_table

_SAMPLE = 10_000  # examples that lengths are measured on, spread evenly
_SHOWN = 160  # characters of a text


def describe(
    source: Any, *, split: str = "train", columns: GivenColumns | None = None, corpus: Any = None, first: int = 3
) -> str:
    """Return a report of a source: columns, counts, lengths, the first examples, and all that is not read.

    Arguments as `open_examples` takes them; `first` is how many examples are shown. A source without queries and
    positives is shown as documents. ValueError for what can be opened as neither.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            examples = open_examples(source, split=split, columns=columns, corpus=corpus)
            lines = [line for s in examples.sources for line in (*_source(s, split), *_shown(s.examples[:first]))]
        except ValueError as error:
            if columns or corpus is not None or is_judged(Path(str(source))) or _has_positives(source):
                raise
            opened = len(caught)
            try:
                lines = list(_documents(source, first))
            except ValueError:
                raise error from None
            if len(caught) > opened:  # something is not read: it may be training data by other names
                warnings.warn(f"shown as documents, since it is not training data: {error}", stacklevel=1)
    notes = dict.fromkeys(str(warning.message) for warning in caught)
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _has_positives(source: Any) -> bool:
    """Return True if the header or the first record has a column for positives, and so is not of documents."""
    columns = Columns(EXAMPLE)
    with suppress(ValueError):
        record = open_table(source, columns, None)[0]
        if isinstance(record, Mapping):
            columns.layout(record)
    return not {"positive", "positive_ids"}.isdisjoint(columns.roles.values())


def _source(source: Source, split: str) -> Iterator[str]:
    examples = source.examples
    yield f"{source.name}: {len(examples)} examples"
    if source.columns is None:
        folder = Path(source.name)
        judged = open_judged(folder, split)
        yield f"  split      {split}, of {', '.join(sorted(qrels_files(folder)))}"
        yield f"  corpus     {judged.corpus.name}: {len(judged.corpus)} documents"
        yield f"  queries    {judged.queries.name}: {len(judged.queries)}, of which {len(judged.qrels)} are judged"
    else:
        by_role: dict[str, list[str]] = {}
        for name, role in source.columns.roles.items():
            by_role.setdefault(role, []).append(name)
        yield "  columns    " + "; ".join(f"{role}: {', '.join(names)}" for role, names in by_role.items())
        yield f"  not read   {', '.join(source.columns.all_unread()) or 'nothing'}"
    step = max(1, len(examples) // _SAMPLE)
    sample = examples[::step]
    if step > 1:
        yield f"  below      of {len(sample)} examples, spread evenly"
    for role in ("positives", "negatives"):
        yield f"  {role}  of a query: {spread(len(getattr(e, role)) for e in sample)}"
    yield f"  words      of a query {spread(_words(e.query) for e in sample)}"
    for role in ("positive", "negative"):
        texts = [passage.full_text for e in sample for passage in getattr(e, f"{role}s")]
        if texts:
            yield f"             of a {role} {spread(map(_words, texts))}"
    for corpus, count in Counter(e.corpus for e in sample).most_common(5):
        if corpus != source.name:
            yield f"  ids        of corpus {corpus}: {count} examples"


def _shown(examples: Sequence[Example]) -> Iterator[str]:
    for number, example in enumerate(examples, 1):
        yield f"  example {number}"
        prompt = "" if example.query_prefix is None else f" (after {example.query_prefix!r})"
        yield f"    query    {_short(example.query)}{prompt}"
        for role, passages in (("positive", example.positives), ("negative", example.negatives)):
            for passage in passages[:2]:
                known = "" if passage.doc_id is None else f" (id {passage.doc_id})"
                yield f"    {role} {_short(passage.full_text)}{known}"
            if len(passages) > 2:
                yield f"    {role} ... and {len(passages) - 2} more"


def _documents(source: Any, first: int) -> Iterator[str]:
    documents = open_corpus(source, needs_ids=False)
    yield f"{documents.name}: {len(documents)} documents, {'with' if documents.has_ids else 'without'} ids"
    texts = documents.texts[:: max(1, len(documents) // _SAMPLE)]
    yield f"  words      of a text {spread(map(_words, texts))}"
    for document in documents[:first]:
        yield f"  {document.doc_id or 'text'}  {_short(document.full_text)}"


def _words(text: str) -> int:
    return len(text.split())


def spread(numbers: Iterable[int]) -> str:
    """Return the least, the median, the 95th percentile and the largest of some numbers, in words."""
    ordered = sorted(numbers)
    if ordered[0] == ordered[-1]:
        return str(ordered[0])
    median, most = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95))
    return f"{ordered[0]} to {ordered[-1]} (half up to {median}, 95 % up to {most})"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
