"""The workflow files themselves: whole, tidy, and installable from (needs no ComfyUI)."""

import itertools

import pytest
from comfy_host import REPOSITORY
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
        assert nodes[target]["inputs"][into]["link"] == link and nodes[target]["inputs"][into]["type"] in (kind, "*")
    ends = [slot["link"] for node in workflow["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    assert sorted(ends) == sorted(link[0] for link in workflow["links"])


def test_nodes_do_not_overlap(workflow):
    boxes = [(node["type"], *node["pos"], *node["size"]) for node in workflow["nodes"]]
    for (a, ax, ay, aw, ah), (b, bx, by, bw, bh) in itertools.combinations(boxes, 2):
        apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by - TITLE or by + bh <= ay - TITLE
        assert apart, f"{a} and {b} overlap"


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
