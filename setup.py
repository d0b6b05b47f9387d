"""Everything is in pyproject.toml; a compiled extension, if one is ever needed, goes here."""

from setuptools import setup

setup()
