"""What modules hold in ``__slots__`` is copied as their other attributes are."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tbn_compiler.graph.copying import share_tensors_copy


class Slots(nn.Module):
    __slots__ = ("__hidden", "attributes", "call", "empty", "method", "parent", "tensor")

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.attributes = {"list": [1]}
        self.call: Any = lambda x: self.fc(x)
        self.method, self.parent, self.tensor = self.fc.forward, weakref.ref(self), torch.ones(2)
        self.__hidden = [self.fc]

    def hidden(self) -> nn.Module:
        return self.__hidden[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.call(x)
        return y


class Derived(Slots):
    """Slots of a class below, and one of the class itself."""

    __slots__ = "own"

    def __init__(self) -> None:
        super().__init__()
        self.own = [self.attributes]


class CopiesItself(Slots):
    """A class that does it better is left alone."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        new.attributes = "its own"
        return new


def test_slots_are_copied_and_bound_to_the_copy() -> None:
    model, x = nn.Sequential(Derived()), torch.randn(3, 4)
    clone = share_tensors_copy(model)
    own, other = model[0], clone[0]
    assert other.attributes == own.attributes
    assert other.attributes is not own.attributes
    assert other.own[0] is other.attributes
    assert other.tensor is own.tensor
    assert other.hidden() is other.fc is not own.fc
    assert other.method.__self__ is other.fc
    assert other.parent() is other
    assert not hasattr(other, "empty")
    expected = model(x)
    other.fc.register_forward_hook(lambda module, x, y: 2 * y)
    assert torch.equal(clone(x), 2 * expected)
    assert torch.equal(model(x), expected)


def test_a_slot_that_the_class_fills_itself() -> None:
    clone = share_tensors_copy(CopiesItself())
    assert clone.attributes == "its own"
    assert clone.hidden() is clone.fc
