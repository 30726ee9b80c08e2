"""Other people's checkpoints: `moe.hub.load` opens a Hugging Face folder of a known family, `moe.hub.save` writes
one."""

from moe.hub.exports import export_run, save
from moe.hub.folder import HubError
from moe.hub.imports import import_run, load

__all__ = ["HubError", "export_run", "import_run", "load", "save"]
