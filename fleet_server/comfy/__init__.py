"""ComfyUI's own HTTP and WebSocket surface in front of the whole fleet, on a port of its own."""

from fleet_server.comfy.app import comfy_app
from fleet_server.comfy.parts import ComfyParts, ComfySettings
from fleet_server.comfy.sockets import Sockets, SocketSettings

__all__ = ["ComfyParts", "ComfySettings", "SocketSettings", "Sockets", "comfy_app"]
