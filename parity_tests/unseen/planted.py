"""Three mistakes that can be planted in any model: a bit, an epsilon, a module that is skipped.

Each is planted in the renamed port and returns where it has to be found, in the reference's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from parity_tests.unseen.renamed import Renamed

Plant = Callable[[Renamed, Tensor], str | None]
"""(port, token ids) to the name of the site; None where the model has no place for the mistake."""


def a_bit(port: Renamed, input_ids: Tensor) -> str | None:
    """The last bit of one weight of a matrix in the middle of the model."""
    ran = _ran(port, input_ids)
    name, module = _middle([(name, module) for name, module in ran if _matrix(module) is not None])
    weight = _matrix(module)
    assert weight is not None, "it was chosen for having one"
    flip(weight)
    return name


def flip(weight: Tensor) -> None:
    """The last bit of its first value."""
    kind = {4: torch.int32, 2: torch.int16}[weight.element_size()]
    weight.data.view(kind).view(-1)[0] ^= 1


def an_epsilon(port: Renamed, input_ids: Tensor) -> str | None:
    """A hundredth more of it, in the middle one of the norms: a mixer may hold one for nothing."""
    ran = [(name, module) for name, module in _ran(port, input_ids) if not any(module.children())]
    places = [(name, module) for name, module in ran if _epsilon(module)]
    if not places:
        return None
    name, module = _middle(places)
    word = _epsilon(module)
    setattr(module, word, getattr(module, word) * 1.01)
    return name


def a_skip(port: Renamed, input_ids: Tensor) -> str | None:
    """A module that gives what it was given, in the middle of those of which that is another.

    Experts run in another form in float64: what is within them is judged by what they give.
    """
    places: list[tuple[str, nn.Module]] = []
    for name, module, given, output in _calls(port, input_ids):
        same = isinstance(output, Tensor) and output.shape == given.shape
        if (
            same
            and ".experts." not in name
            and not any(module.children())
            and not torch.equal(output, given)
        ):
            places.append((name, module))
    name, module = _middle(places)
    module.forward = lambda given, *_, **__: given.clone()  # type: ignore[method-assign]
    return name


def _middle(places: list[tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
    return places[len(places) // 2]


def _matrix(module: nn.Module) -> nn.Parameter | None:
    if isinstance(module, nn.Embedding):
        return None  # of which a row may not be used
    own = module.parameters(recurse=False)
    return next((one for one in own if one.dim() > 1 and one.numel() > 1), None)


def _epsilon(module: nn.Module) -> str:
    return next(
        (
            name
            for name, value in vars(module).items()
            if "eps" in name and isinstance(value, float) and value > 0
        ),
        "",
    )


def _ran(port: Renamed, input_ids: Tensor) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module, _, _ in _calls(port, input_ids)]


@torch.no_grad()
def _calls(port: Renamed, input_ids: Tensor) -> Iterator[tuple[str, nn.Module, Tensor, object]]:
    """The reference's name, module, first input and output of each that is called with a tensor."""
    names = dict(line.split(" = ") for line in port.sites.splitlines())
    called: dict[str, tuple[str, nn.Module, Tensor, object]] = {}

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor):
                called.setdefault(name, (names[name], module, args[0].clone(), output))

        return after

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in port.named_modules()
        if name in names
    ]
    positions = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
    port(input_ids, positions, None)
    for handle in handles:
        handle.remove()
    yield from called.values()
