"""One version, written in meson.build and nowhere else by hand but in the changelog."""

import importlib.metadata
import re
from pathlib import Path

import dsline

ROOT = Path(__file__).resolve().parents[2]


def project_version():
    return re.search(r"^  version: '([^']+)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]


def test_the_installed_package_has_the_version_of_meson_build():
    assert importlib.metadata.version("dsline") == project_version()


def test_the_module_has_the_version_of_meson_build():
    assert dsline.__version__ == project_version()


def test_the_newest_entry_of_the_changelog_is_this_version():
    newest = re.search(r"^## ([^\s(]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == project_version()
