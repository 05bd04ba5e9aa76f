"""Embed a corpus, search it exactly, and measure the results."""
