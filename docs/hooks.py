"""What the site takes from outside of docs/: two pages, and the files that pages link to."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "losses.md": "inbatch/losses/README.md"}
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    linked = {target for page in Path(config.docs_dir).rglob("*.md") for target in OUTSIDE.findall(page.read_text())}
    for target in sorted({*linked, "CONTRIBUTING.md", "CHANGELOG.md"} - set(PAGES.values())):
        copied = f"repository/{target}{'.txt' if target.endswith('.md') else ''}"  # not a page
        files.append(File.generated(config, copied, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    for name, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}").replace(f"]({source}", f"]({name}")
    markdown = re.sub(r"\]\(((?:CONTRIBUTING|CHANGELOG)\.md)", r"](repository/\1.txt", markdown)
    return OUTSIDE.sub(r"](repository/\1", markdown).replace("](docs/", "](")
