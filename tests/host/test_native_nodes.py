"""docs/native_nodes.md and the checks behind it say the same (needs no ComfyUI)."""

import re
from pathlib import Path

from comfy_host import REPOSITORY
from host_checks import load_checks

CONTRACT = load_checks(Path(__file__).with_name("contract_native.py"))
PAGE = (REPOSITORY / "docs" / "native_nodes.md").read_text()


def section(title: str) -> str:
    return re.search(rf"^##+ {title}\n(.*?)(?=^##+ |\Z)", PAGE, re.M | re.S)[1]


def lines_of_the_page() -> dict[str, tuple[str, str]]:
    """Id of a node -> what the page says of frames as batch and of clips."""
    lines = {}
    for title in ("VAE and conditioning", "Samplers and training", "Latents", "Video"):
        for row in re.findall(r"^\| .*`.*$", section(title), re.M):
            nodes, batch, clips, _ = (cell.strip() for cell in row.strip("|").split("|"))
            for node in re.findall("`(.+?)`", nodes):
                assert node not in lines, f"{node} is there twice"
                lines[node] = batch, clips
    return lines


def test_every_line_is_what_a_check_finds():
    assert lines_of_the_page() == CONTRACT.LINES


def test_other_families_are_named():
    named = re.findall("`([a-z0-9_]+)`", section("Other models' nodes").partition("without `nodes_`:")[2])
    assert set(named) == CONTRACT.FAMILIES


def test_first_versions_are_named():
    for node, version in CONTRACT.SINCE.items():
        row = next(row for row in PAGE.splitlines() if row.startswith("|") and f"`{node}`" in row)
        assert f"Since ComfyUI {version.removesuffix('.0')}." in row, node
