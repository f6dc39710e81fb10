"""Hooks, theme and extensions with which MkDocs builds the documentation site (mkdocs.yml, `make docs`).

The same files are read on GitHub and on the site. What GitHub has and MkDocs lacks is added here: files outside docs/ that
documents link to, GitHub's anchors, and a few rules of its Markdown.
"""
