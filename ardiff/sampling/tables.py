"""Tables that requests share: computed on first use, kept while there is memory for them."""

from collections.abc import Iterable
from typing import Generic, TypeVar

from ardiff.sampling.request import SampleRequest

KeyT = TypeVar("KeyT")
TableT = TypeVar("TableT")
MAX_IDLE_TABLES = 16
"""Tables that no running request uses, kept for requests to come."""


class SharedTables(Generic[KeyT, TableT]):
    """Tables by what they depend on. A subclass computes them and knows their memory."""

    def __init__(self) -> None:
        self._tables: dict[KeyT, TableT] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def keys_of(self, requests: Iterable[SampleRequest]) -> set[KeyT]:
        """The tables that requests need."""
        raise NotImplementedError

    def num_bytes(self, keys: Iterable[KeyT]) -> int:
        """Memory of tables."""
        raise NotImplementedError

    def num_bytes_of(self, requests: Iterable[SampleRequest]) -> int:
        """Memory of the tables that requests need."""
        return self.num_bytes(self.keys_of(requests))

    def evict(self, running: Iterable[SampleRequest], spare_bytes: int) -> int:
        """Drops the oldest tables that no running request needs, until few are left and they fit ``spare_bytes``.
        Returns the bytes of those left."""
        needed = self.keys_of(running)
        idle = [key for key in self._tables if key not in needed]
        while idle and (len(idle) > MAX_IDLE_TABLES or self.num_bytes(idle) > spare_bytes):
            del self._tables[idle.pop(0)]
        return self.num_bytes(idle)
