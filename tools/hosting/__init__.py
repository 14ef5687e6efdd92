"""What the tools share: finding or making the ComfyUI to run in, starting a server, talking to it.

Modules here that run before the private interpreter exists use the standard library only.
"""
