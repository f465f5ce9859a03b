"""Events of mkdocs: pages get their tables, links that leave docs/ get a place on the site, the navigation its many pages.

mkdocs.yml names this file; ``make docs`` builds the site.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# mkdocs loads this as a file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs_site.links import linked_files, site_links
from docs_site.navigation import expand
from docs_site.tables import TABLES, fill_in


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Patterns of the navigation become the pages that they match."""
    if config.nav is not None:
        config.nav = expand(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Files of the repository that pages lead to are on the site, too."""
    for uri, path in sorted(linked_files(Path(config.docs_dir)).items()):
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **rest: Any) -> str:
    """A page with its tables filled in and its links as the site has them."""
    return fill_in(site_links(markdown, page.file.src_uri, Path(config.docs_dir)), TABLES)
