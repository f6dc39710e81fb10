"""Readers of datasets in other projects' formats, which `registry` recognizes by a directory's contents."""
