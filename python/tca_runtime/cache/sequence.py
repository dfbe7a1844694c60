"""The part of the KV cache that one running request owns or holds locked."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import PrefixHandle
from tca_runtime.cache.views import View


@dataclass(eq=False)
class Sequence:
    """Slots of one request; only ``CacheManager`` changes it.

    Token axis of a sequence::

        |--- handle (locked in the tree) ---|--------- blocks (owned) ---------|
        0                          handle.num_tokens                        allocated
        |------------- computed: K and V are valid -------------|-- prepared --|

    Attributes
    ----------
    handle : locked prefix
    view : what attention sees
    computed : tokens whose K and V are in their slots once the running step is done
    blocks : int32 ``[rows, n]`` each, consecutive runs of tokens after the handle
    duplicates : slots of tokens that another request put into the tree first; the view still
        lists them, so they are held until the end
    """

    handle: PrefixHandle
    view: View
    computed: int
    blocks: list[Tensor] = field(default_factory=list)
    duplicates: list[HeadSlots] = field(default_factory=list)

    @property
    def allocated(self) -> int:
        return self.handle.num_tokens + sum(int(block.shape[1]) for block in self.blocks)

    @property
    def owned_slots(self) -> int:
        owned = sum(int(block.numel()) for block in self.blocks)
        return owned + sum(part.num_slots for part in self.duplicates)

    def copy_of(self, begin: int, end: int) -> HeadSlots | None:
        """Its own copy of tokens that the tree has too, None without one."""
        for part in self.duplicates:
            if part.begin <= begin and end <= part.end:
                return part.split(begin)[1].split(end)[0]
        return None
