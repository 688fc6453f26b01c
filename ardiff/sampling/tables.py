"""Tables that requests share: computed on first use, kept while there is memory for them."""

from collections.abc import Iterable
from typing import Generic, TypeVar

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

    def num_bytes(self, keys: Iterable[KeyT]) -> int:
        """Memory of tables."""
        raise NotImplementedError

    def evict(self, needed: set[KeyT], spare_bytes: int) -> int:
        """Drops the oldest tables that are not needed, until few are left and they fit ``spare_bytes``. Returns the
        bytes of those left."""
        idle = [key for key in self._tables if key not in needed]
        while idle and (len(idle) > MAX_IDLE_TABLES or self.num_bytes(idle) > spare_bytes):
            del self._tables[idle.pop(0)]
        return self.num_bytes(idle)
