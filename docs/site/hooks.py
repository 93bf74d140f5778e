"""Makes the site of what the repository has: README.md is the home page, examples are pages.

Pages link to files as they lie in the repository, so that they can be read there; here such links
are turned to the pages of the site. A link that leads nowhere fails the build (``strict``).
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that are made here to the navigation."""
    config.nav += [
        {"Examples": [{path.name: f"examples/{path.stem}.md"} for path in EXAMPLES]},
        {"Project": [{name: f"project/{name}"} for name in PROJECT]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as the home page, and a page for each example."""
    home = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=home))
    for path in EXAMPLES:
        text = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    for name in PROJECT:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"project/{name}", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository to pages of the site."""
    there = page.file.src_uri
    here = {"index.md": "README.md"}.get(there) or (
        there.removeprefix("project/") if there.startswith("project/") else f"docs/{there}"
    )

    def turned(match: re.Match[str]) -> str:
        target = relpath((ROOT / here).parent.joinpath(match[1]).resolve(), ROOT)
        target = re.sub(r"^examples/(\w+)\.py$", r"docs/examples/\1.md", target)
        target = re.sub(r"^README\.md$", "docs/index.md", target)
        target = re.sub(r"^([A-Z]+\.md)$", r"docs/project/\1", target)
        if target == "docs/extending":
            target = "docs/extending/README.md"
        if not target.startswith("docs/") or "." not in Path(target).name:
            return match[0]
        start = f"docs/{there}".rpartition("/")[0]
        return f"]({relpath(target, start)}{match[2]})"

    return LINK.sub(turned, markdown)
