"""The workflow files themselves: whole, tidy, and installable from (needs no ComfyUI)."""

import itertools

import pytest
from comfy_host import REPOSITORY
from PIL import Image
from workflow_models import wrong_models

from cvvae.download import PUBLISHED

TITLE = 30  # pixels of a node's title, above its position
NAMES = sorted(path.stem for path in (REPOSITORY / "workflows").glob("*.json"))


@pytest.fixture(params=NAMES)
def workflow(request, workflows):
    return workflows[request.param]


def test_links_fit_on_both_ends(workflow):
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, out, target, into, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][out]["links"] and nodes[source]["outputs"][out]["type"] == kind
        assert nodes[target]["inputs"][into]["link"] == link
        assert nodes[target]["inputs"][into]["type"] == "*" or kind in nodes[target]["inputs"][into]["type"].split(",")
    ends = [slot["link"] for node in workflow["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    assert sorted(ends) == sorted(link[0] for link in workflow["links"])


def test_nodes_do_not_overlap(workflow):
    boxes = [(node["type"], *node["pos"], *node["size"]) for node in workflow["nodes"]]
    for (a, ax, ay, aw, ah), (b, bx, by, bw, bh) in itertools.combinations(boxes, 2):
        apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by - TITLE or by + bh <= ay - TITLE
        assert apart, f"{a} and {b} overlap"


def test_every_node_is_in_one_group(workflow):
    groups = [(group["title"], *group["bounding"]) for group in workflow["groups"]]
    for (a, ax, ay, aw, ah), (b, bx, by, bw, bh) in itertools.combinations(groups, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay, f"groups {a} and {b} overlap"
    for node in workflow["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        around = [title for title, x, y, w, h in groups
                  if x <= left and left + width <= x + w and y <= top - TITLE and top + height <= y + h]
        assert len(around) == 1, f"{node['type']} {node['id']} is in {around}"


def test_wires_run_to_the_right(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, _, target, _, _ in workflow["links"]:
        assert nodes[source]["pos"][0] <= nodes[target]["pos"][0], f"{nodes[source]['type']} to {nodes[target]['type']}"


def test_the_template_browser_has_something_to_show(request, workflow):
    """It shows the picture of the same name, square; the description is for those who read files."""
    assert workflow["extra"]["info"]["description"].endswith(".")
    path = REPOSITORY / "workflows" / f"{request.node.callspec.params['workflow']}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.width == picture.height >= 400
    assert path.stat().st_size < 100_000


def test_nodes_say_where_they_come_from(workflow):
    for node in workflow["nodes"]:
        if node["type"] != "Note":
            assert node["properties"]["Node name for S&R"] == node["type"]
            assert node["properties"]["cnr_id"] == ("cv-vae" if node["type"].startswith("CVVAE") else "comfy-core")


def test_models_are_those_that_are_published(workflow):
    assert wrong_models(workflow) == []


def test_wrong_models_are_found():
    def loader(value: str, *models: dict) -> dict:
        return {"nodes": [{"id": 1, "type": "CVVAELoader", "widgets_values": [value], "properties": {"models": models}}]}

    published = PUBLISHED["vae3d"]
    assert wrong_models(loader("tiny (built in)")) == wrong_models(loader(published.file, published.entry())) == []
    assert "lack" in wrong_models(loader(published.file))[0]
    [wrong] = wrong_models(loader("tiny (built in)", published.entry() | {"directory": "checkpoints"}))
    assert "is not in cvvae.download.PUBLISHED" in wrong


def test_there_is_a_note(workflow):
    assert any(node["type"] == "Note" for node in workflow["nodes"])


def test_media_is_small_and_licensed():
    media = REPOSITORY / "workflows" / "media"
    licences = (media / "LICENSES.md").read_text()
    for path in media.iterdir():
        assert path.name == "LICENSES.md" or path.name in licences and path.stat().st_size < 300_000
