"""Documents that cannot rot: generated, or compared with what they describe."""

import re

import pytest

from engine.config import Recipe
from engine.recipe import fields
from tests.conftest import ROOT
from tests.write_docs import COMMANDS, TARGET, render

README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
SOURCES = [p for folder in ("cli", "engine") for p in (ROOT / folder).rglob("*.py")]


def test_cli_page_is_current():
    assert TARGET.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_command_is_on_the_cli_page():
    from cli.main import program

    app = program()
    names = {info.name for info in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert names == {words[0] for words in COMMANDS if words}


def test_readme_tree_is_true():
    """Every path that the tree names exists, and every engine file is in it."""
    tree = README.split("```text\n")[-1].split("```")[0]
    named = set(re.findall(r"([\w/]+\.(?:py|md|yaml))", tree))
    real = {path.name for path in SOURCES if path.name != "__init__.py"}
    in_engine = {path.name for path in SOURCES if "engine" in path.parts} - {"__init__.py"}
    assert in_engine <= {name.rsplit("/", 1)[-1] for name in named}
    for name in named:
        assert name.rsplit("/", 1)[-1] in real or (ROOT / name).exists(), name


def test_readme_opens_with_the_two_commands():
    block = README.split("```")[1]
    assert "make demo" in block and "make test" in block


def test_every_schema_is_documented():
    schemas = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        schemas |= set(re.findall(r'emit_json\(\s*"([\w/-]+)"', text))
    assert schemas
    for schema in schemas:
        assert f"lm/{schema}/1" in FORMATS, schema


def test_every_paper_cited_is_listed():
    cited = set()
    for path in SOURCES:
        cited |= set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text(encoding="utf-8")))
    assert cited
    listed = set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", PAPERS))
    assert cited == listed


def test_every_field_has_a_meaning():
    for key, field in fields().items():
        doc = field.metadata["doc"]
        assert doc and not doc.endswith(".") and len(doc) < 80, key


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/formats.md"])
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_recipes_in_the_documents_load(run):
    """Every `lm train …` line of the README names a recipe and keys that exist."""
    from engine.recipe import load

    lines = re.findall(r"^(?:\$ )?lm train (\S+)((?: \S+=\S+)*)", README, re.MULTILINE)
    assert lines
    for name, overrides in lines:
        text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert isinstance(load(text, name, overrides.split()), Recipe)


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    assert version
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
