"""What the documentation promises: that messages it explains exist, that links lead somewhere."""

import ast
import re

import pytest
from comfy_host import REPOSITORY

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"
HELP = sorted((REPOSITORY / "web" / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md")), *HELP]
ANYTHING = "…"  # stands for what a message names


def text_of(node: ast.AST) -> str | None:
    """A string of the source, with ANYTHING for its parts that are computed."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", ANYTHING, node.value)
    return None


@pytest.fixture(scope="module")
def strings() -> list[str]:
    """Every string in the code."""
    files = [*(REPOSITORY / "nodes").glob("*.py"), *(REPOSITORY / "cvvae").rglob("*.py")]
    found = (text_of(node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [" ".join(text.split()) for text in found if text]


@pytest.mark.parametrize("page", [TROUBLESHOOTING, *HELP], ids=lambda page: page.stem)
def test_messages_that_are_explained_exist(strings, page):
    pattern = r"^### (.+)$" if page == TROUBLESHOOTING else r"\*\*(.+?)\*\*"
    text = page.read_text(encoding="utf-8")
    section = text if page == TROUBLESHOOTING else text.partition("## If it goes wrong")[2]
    messages = re.findall(pattern, section, re.MULTILINE)
    assert messages or "## If it goes wrong" not in text
    missing = [message for message in messages if not any(said(message, string) for string in strings)]
    assert not missing, missing


def said(message: str, string: str) -> bool:
    """Whether ``string`` says ``message``, in which ANYTHING may also stand for fixed words."""
    return re.search(".*?".join(map(re.escape, message.split(ANYTHING))), string) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    gone = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not gone, gone
