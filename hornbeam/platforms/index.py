"""Which device kinds there are; each module is imported only when it is asked for."""

from typing import Protocol

from hornbeam.core.registry import Registry
from hornbeam.platforms.contract import Platform


class PlatformEntry(Protocol):
    """A registry entry."""

    def supports(self, query: None) -> str | None:
        """None if such a device is here, else the reason why not."""

    def create(self) -> Platform:
        """The platform, ready for use."""


PLATFORMS: Registry[None, PlatformEntry] = Registry(
    "platforms", {"cuda": "hornbeam.platforms.cuda:ENTRY", "cpu": "hornbeam.platforms.cpu:ENTRY"}
)
