"""Pages of the site that live elsewhere in the repository, and the links to them.

Pages link to these files where they are, so that the links work on GitHub too.
"""

import logging
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File

ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/LOG.md": "log.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Adds the files to the site."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Drops what is meant for GitHub, and points links to where the files are on the site."""
    markdown = re.sub(r"^\*On GitHub .*\*\n\n", "", markdown, flags=re.M)
    here = page.file.src_uri
    source = {page: source for source, page in ELSEWHERE.items()}.get(here, f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = ELSEWHERE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Points links and pictures of notebooks, which mkdocs leaves alone, to those of the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def moved(link: re.Match[str]) -> str:
        path = posixpath.join(posixpath.dirname(page.file.src_uri), link[2])
        file = files.get_file_from_path(posixpath.normpath(path))
        if file is None:
            logging.getLogger("mkdocs.hooks").warning("%s: no file %s", page.file.src_uri, path)
            return link[0]
        return f'{link[1]}="{file.url_relative_to(page.file)}{link[3] or ""}"'

    return re.sub(r'(href|src)="([^":#]+\.(?:md|ipynb|png))(#[^"]*)?"', moved, html)
