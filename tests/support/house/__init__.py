"""Measures of the house rules: prose, Markdown, files. Pure, but for `files`."""
