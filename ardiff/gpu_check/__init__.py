"""``ardiff gpu-check``: measures whether and how fast the code runs on this machine's device."""
