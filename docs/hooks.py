"""Events of the mkdocs build: links that leave the site."""

import logging
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
_log = logging.getLogger("mkdocs.hooks")
_external: set[str] = set()


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point relative links to files outside docs/, such as tests and benchmarks, to the repository."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def leave_site(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return _LINK.sub(leave_site, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Collect the page's external links."""
    _external.update(re.findall(r'href="(https?://[^"]+)"', html))


def on_post_build(*, config: MkDocsConfig) -> None:
    """List the external links, which the build does not follow."""
    _log.info("External links, not checked:\n  %s", "\n  ".join(sorted(_external)))
