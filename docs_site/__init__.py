"""Hooks, theme and extensions of the documentation site, which MkDocs builds (mkdocs.yml, `make docs`).

GitHub and the site show the same files. This package adds the features that MkDocs lacks: pages for linked files outside docs/,
GitHub's anchors, and a few rules of its Markdown.
"""
