"""ComfyUI nodes that patch a MODEL so that the images it generates show a given subject."""

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class SubjectPatches(ComfyExtension):
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return []


async def comfy_entrypoint() -> ComfyExtension:
    """What the host calls to load the pack."""
    return SubjectPatches()
