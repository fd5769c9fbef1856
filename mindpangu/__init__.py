"""mindpangu: openPangu Embedded-1B's whole recipe on MindSpore, for Ascend and for a laptop's CPU."""

__version__ = "0.1.0"
