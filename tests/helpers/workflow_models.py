"""The ``models`` entries of workflow files, by which ComfyUI offers to download what is missing."""

from cvvae.download import PUBLISHED, REPOSITORY


def wrong_models(workflow: dict) -> list[str]:
    """What is wrong with the entries for CV-VAE's published files: each is to be that of ``cvvae.download``, on the node
    that is set to it."""
    entries = {published.file: published.entry() for published in PUBLISHED.values()}
    wrong = []
    for node in workflow["nodes"]:
        given = node.get("properties", {}).get("models", [])
        for entry in given:
            if (node["type"] == "CVVAELoader" or f"/{REPOSITORY}/" in entry["url"]) and entry not in entries.values():
                wrong.append(f"{node['type']} {node['id']}: {entry} is not in cvvae.download.PUBLISHED")
        chosen = node.get("widgets_values", [None])[0] if node["type"] == "CVVAELoader" else None
        if chosen in entries and entries[chosen] not in given:
            wrong.append(f"{node['type']} {node['id']}: is set to {chosen}, but its properties lack {entries[chosen]}")
    return wrong
