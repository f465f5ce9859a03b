"""What the documentation site is built with, beside mkdocs.yml: tables made from code, links, and the order of pages."""
