"""Help inside ComfyUI, as its server gives it: a page for each node, and every text in each language."""

import re
import urllib.request

import pytest
from comfy_host import REPOSITORY

PAGES = REPOSITORY / "web" / "docs"
TRANSLATIONS = ("ja", "zh")
LARGEST_PICTURE = 60_000  # bytes
MESSAGE_SYNTAX = re.compile("[{}|@]")  # what the front end's translator would take for its own


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    """The definitions of this pack's nodes."""
    return {name: info for name, info in server.get("/object_info").items()
            if info["python_module"] == f"custom_nodes.{server.pack}"}


def inputs_of(node: dict) -> dict[str, dict]:
    """The options of each input, by name; a combo's choices under "options" on every host."""
    specs = node["input"].get("required", {}) | node["input"].get("optional", {})
    return {name: {"options": spec[0] if isinstance(spec[0], list) else [], **spec[1]} for name, spec in specs.items()}


def texts_of(node: dict) -> dict:
    """What the front end translates, in its format; outputs only where they say more than their type."""
    texts = {"display_name": node["display_name"], "description": node["description"],
             "inputs": {name: {"name": spec.get("display_name") or name, "tooltip": spec["tooltip"]}
                        for name, spec in inputs_of(node).items()}}
    outputs = {}
    tooltips = node["output_tooltips"] or [None] * len(node["output"])
    for place, (kind, name, tooltip) in enumerate(zip(node["output"], node["output_name"], tooltips, strict=True)):
        if texts_of_output := {key: text for key, text in (("name", name), ("tooltip", tooltip)) if text and text != kind}:
            outputs[str(place)] = texts_of_output
    return texts | ({"outputs": outputs} if outputs else {})


def flat(tree: dict, path: str = "") -> dict[str, str]:
    """{"a": {"b": text}} -> {"a.b": text}."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def test_english_equals_the_definitions(server, nodes):
    assert flat(server.get("/i18n")["en"]["nodeDefs"]) == flat({name: texts_of(node) for name, node in nodes.items()})


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_are_complete(server, nodes, language):
    english = flat({name: texts_of(node) for name, node in nodes.items()})
    translated = flat(server.get("/i18n")[language]["nodeDefs"])
    assert translated.keys() == english.keys()
    assert all(text.strip() and not MESSAGE_SYNTAX.search(text) for text in [*translated.values(), *english.values()])


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_say_the_same(server, nodes, language):
    """As far as a machine can tell: numbers and the choices that are quoted are those of the definitions."""
    translated = server.get("/i18n")[language]["nodeDefs"]
    wrong = []
    for node_id, node in nodes.items():
        for name, spec in inputs_of(node).items():
            text = translated[node_id]["inputs"][name]["tooltip"]
            said = set(re.findall(r"\d[\d.,]*\d|\d", spec["tooltip"]))
            said |= {str(option) for option in spec["options"] if f"'{option}'" in spec["tooltip"]}
            wrong += [f"{node_id}.{name}: no {word!r}" for word in said if word not in text]
    assert not wrong, wrong


def test_every_node_has_words_to_search_for(nodes):
    assert not [name for name, node in nodes.items() if "cvvae" not in (node["search_aliases"] or [])]


def test_every_node_has_a_page(server, nodes):
    assert {path.stem for path in PAGES.glob("*.md")} == set(nodes)
    for name, node in nodes.items():
        page = fetch(server, f"{name}.md").decode()
        pictures = re.findall(r"!\[.+?\]\((.+?)\)", page)
        assert page.startswith(f"# {node['display_name']}\n"), name
        assert pictures and all(fetch(server, picture) for picture in pictures), name
        told = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
        assert told <= set(inputs_of(node)), f"{name} tells of inputs it does not have: {told - set(inputs_of(node))}"


def test_pictures_are_small_and_used():
    used = set(re.findall(r"!\[.+?\]\((.+?)\)", "".join(path.read_text() for path in PAGES.glob("*.md"))))
    pictures = {path.name: path for path in PAGES.iterdir() if path.suffix != ".md"}
    assert set(pictures) == used
    assert not [name for name, path in pictures.items() if path.stat().st_size > LARGEST_PICTURE]


def fetch(server, path: str) -> bytes:
    """As the front end's help panel asks for it."""
    with urllib.request.urlopen(f"{server.url}/extensions/{server.pack}/docs/{path}", timeout=30) as answer:
        return answer.read()
