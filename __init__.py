"""The door: ComfyUI calls ``comfy_entrypoint`` and gets the nodes.

Nothing is imported before that call, so test runners and tools may import this file without ComfyUI.
"""

WEB_DIRECTORY = "./web"  # the help pages


async def comfy_entrypoint():
    from .nodes import CVVAEExtension

    return CVVAEExtension()
