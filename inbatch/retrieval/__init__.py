"""Embed a corpus, search it exactly, and measure what was found."""
