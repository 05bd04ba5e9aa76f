"""The report of `inbatch check` as one HTML page that needs nothing beside it; its plots are SVG within it."""

import base64
import html
import io
from collections.abc import Iterator
from typing import Any

from inbatch.train.check import Check, SourceFacts, text

_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
li { margin: .4rem 0 } .error { color: #b00020 } .warning { color: #8a5a00 } img { max-width: 100%; height: auto }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto }"""


def page(checked: Check, name: str) -> str:
    """Return the page."""
    title, *lines = text(checked, name)
    findings = "".join(
        f'<li><b class="{finding.level}">{finding.level}, {finding.code}</b>: {html.escape(finding.text)}</li>'
        for finding in checked.findings
    )
    figures = "".join(
        f'<img alt="tokens and candidates" src="data:image/svg+xml;base64,{svg}">' for svg in _figures(checked)
    )
    rest = "\n".join(lines[len(checked.findings) :])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f"<ul>{findings or '<li>nothing found</li>'}</ul>\n{figures}\n<pre>{html.escape(rest)}</pre></body></html>\n"
    )


def _figures(checked: Check) -> Iterator[str]:
    import matplotlib
    from matplotlib.figure import Figure

    for number, facts in enumerate(checked.sources):
        figure = Figure(figsize=(10, 3), layout="constrained")
        tokens, batch = figure.subplots(1, 2)
        _lengths(tokens, facts)
        of_source = checked.batches.sources == number
        batch.hist(checked.batches.candidates[of_source], bins=40, label="candidates")
        batch.hist(checked.batches.copies[of_source], bins=40, label="copies of its positives")
        batch.set(xlabel="of a query, in its batch", ylabel="queries", yscale="log")
        batch.legend()
        with matplotlib.rc_context({"svg.hashsalt": "inbatch"}):  # equal pages for equal findings
            figure.savefig(written := io.BytesIO(), format="svg", metadata={"Date": None})
        # In base64: as elements of the page, several SVGs would share names.
        yield base64.b64encode(written.getvalue()).decode()


def _lengths(axes: Any, facts: SourceFacts) -> None:
    for color, (side, tokens) in zip(("C0", "C1"), facts.tokens.items(), strict=True):
        axes.hist(tokens, bins=60, alpha=0.6, color=color, label=side)
        axes.axvline(facts.limits[side], color=color, linestyle="--", label=f"{side}_max_len")
    axes.set(xlabel="tokens", ylabel="texts", yscale="log", title=facts.name[-60:])
    axes.legend()
