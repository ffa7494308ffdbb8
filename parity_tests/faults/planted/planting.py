"""What a planted fault is: a mistake made in a loaded port of ours, and where it must be found.

The catalogue changes the reference; these change the port, as somebody who writes a port would have
written it. They share the names of the faults and no code, so that a mistake in one of the two
cannot hide in the other. Knows how a module of ours is made to run something else; the mistakes
are in the files beside, one a class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from portkit.nn.cache import ChunkedCache
from portkit.nn.rope import RotaryEmbedding

Model = Any
"""A `CausalLM` of ours, whose parts are reached by their names."""

BOTH = ("float32", "bfloat16")
LOW = ("bfloat16",)
"""Where float32 is the right arithmetic."""


@dataclass(frozen=True)
class Need:
    """What a model must have for a fault to be possible in it."""

    otherwise: str
    """What is said of a model that has it not."""
    holds: Callable[[Model], bool]


@dataclass(frozen=True)
class Planting:
    """One mistake. `plant` makes it in a model and says at which site it must be found first."""

    fault: str
    """The catalogue's id."""
    plant: Callable[[Model], str]
    needs: tuple[Need, ...] = ()
    dtypes: tuple[str, ...] = BOTH
    kernel: str = "sdpa"
    variant: str = ""
    """Which, where one fault is planted in several ways."""

    @property
    def name(self) -> str:
        return f"{self.fault} ({self.variant})" if self.variant else self.fault

    def unmet(self, model: Model) -> str | None:
        """Why it cannot be planted in a model; None where it can."""
        unmet = (need.otherwise for need in self.needs if not need.holds(model))
        return next(unmet, None)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `module` run `forward(original, *args)` instead of its own."""
    original = module.forward
    module.forward = lambda *args, **kwargs: forward(original, *args, **kwargs)  # type: ignore[method-assign]


def respell(module: nn.Module, **functions: Callable[..., Any]) -> None:
    """Have `module` run its own code, in which some names mean other functions."""
    own = getattr(module.forward, "__func__", None)
    assert isinstance(own, FunctionType), "what was rewritten as a whole has no names to respell"
    assert functions.keys() <= {*_names(own.__code__)}, f"{own.__qualname__} has no such name"
    names = {**own.__globals__, **functions}
    respelt = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    module.forward = MethodType(respelt, module)  # type: ignore[method-assign]


def _names(code: CodeType) -> Iterator[str]:
    """What a function calls by name, and what the functions within it do."""
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _names(one)


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put other values in place of a parameter. (The mapped file is not to be written to.)"""
    assert getattr(module, name).shape == tensor.shape
    setattr(module, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))


def exchange(one: nn.Module, other: nn.Module) -> None:
    """Exchange the parameters of two modules."""
    for name, tensor in [*one.named_parameters(recurse=False)]:
        theirs = getattr(other, name)
        hold(other, name, tensor)
        hold(one, name, theirs)


def layers(model: Model) -> list[Any]:
    return [*model.model.layers]


def named_as(original: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, its arguments called as those of `original`: it is by names that they are seen."""
    return wraps(original)(forward)


def feed_forwards(model: Model) -> dict[str, Any]:
    """Gated feed-forwards by their sites; experts are none of them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Linear)
    }


def feed_forward(layer: Any) -> Any:
    """A layer's feed-forward, whatever it is called."""
    return layer.mlp if hasattr(layer, "mlp") else layer.feed_forward


ROTATIONS = ("rotate", "rotate_by_token", "rotate_interleaved", "rotate_polar")


def rotation_of(attention: Any) -> str:
    """By which function's name an attention rotates."""
    called = type(attention).forward.__code__.co_names
    return next(name for name in ROTATIONS if name in called)


def by_token(attention: Any) -> bool:
    """Whether its heads lie (batch, tokens, heads, head_dim) when they are rotated."""
    return rotation_of(attention) in {"rotate_by_token", "rotate_polar"}


def rotates(attention: Any) -> bool:
    return bool(getattr(attention, "rotates", True))


def rotating(model: Model) -> list[int]:
    """The layers that rotate."""
    return [i for i, attention in enumerate(attentions(model)) if rotates(attention)]


def first_rotated(model: Model, role: str = "query") -> str:
    """Where a rotation shows first."""
    layer = rotating(model)[0]
    if getattr(attentions(model)[layer], "qk_norm", None) is not None:
        return f"model.layers.{layer}.self_attn.qk_norm{'' if role == 'query' else '@2'}:in"
    return f"model.layers.{layer}.self_attn#{role}"


def first_norm(model: Model) -> str:
    """The first norm that runs."""
    if hasattr(model.model, "per_layer_projection_norm"):
        return "model.per_layer_projection_norm"
    return "model.layers.0.input_layernorm"


def attentions(model: Model) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def norms(model: Model) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "eps")]


def tables(model: Model) -> dict[str, RotaryEmbedding]:
    """The modules that make rotary tables, by their sites' endings: one, or one a layer type."""
    made = model.model.rotary_emb
    if isinstance(made, RotaryEmbedding):
        return {"": made}
    return {f".{kind}": one for kind, one in made.items()}


def windows(model: Model) -> list[int | None]:
    """Each layer's window, None where it sees everything."""
    caches = model.new_cache(1, 1).layers
    return [None if type(one) is ChunkedCache else getattr(one, "window", None) for one in caches]


def first(values: Iterable[Any], value: Any) -> int:
    return [*values].index(value)


def _rope_type(model: Model) -> str:
    kinds = {one.rope.rope_type for one in tables(model).values()} - {"default"}
    return next(iter(kinds), "default")


def rope_is(kind: str) -> Need:
    return Need(f"no rotary table of the type {kind}", lambda model: _rope_type(model) == kind)


def _heads(model: Model) -> tuple[int, int]:
    return model.config.num_attention_heads, model.config.num_key_value_heads


def _has_bias(model: Model) -> bool:
    return attentions(model)[0].q_proj.bias is not None


NORMS_OF_HEADS = Need(
    "queries and keys are not normalised", lambda model: hasattr(attentions(model)[0], "q_norm")
)
PAIRS_OF_HALVES = Need(
    "neighbouring channels are rotated together already",
    lambda model: rotation_of(attentions(model)[0]) in {"rotate", "rotate_by_token"},
)
NEIGHBOURS = Need(
    "channels i and i + d/2 are rotated together already",
    lambda model: not PAIRS_OF_HALVES.holds(model),
)
ROUNDED_TABLES = Need(
    "rotary tables are float32 already",
    lambda model: rotation_of(attentions(model)[0]) != "rotate_polar",
)
NO_NORM_BEHIND = Need(
    "a norm follows the rotation",
    lambda model: getattr(attentions(model)[0], "qk_norm", None) is None,
)
MORE_THAN_ONE_NORM = Need(
    "a layer has one norm", lambda model: hasattr(layers(model)[0], "post_attention_layernorm")
)
ONE_STREAM = Need(
    "a layer has several streams and wirings of its own",
    lambda model: not hasattr(layers(model)[0], "altup"),
)
SEQUENTIAL = Need("attention and feed-forward are parallel", MORE_THAN_ONE_NORM.holds)
NOT_CENTRED = Need(
    "norms subtract the mean already",
    lambda model: type(model.model.norm).__name__ != "CentredLayerNorm",
)
CENTRED = Need("norms do not subtract the mean", lambda model: not NOT_CENTRED.holds(model))
CASTS_FIRST = Need(
    "norms multiply by their weight in float32 already",
    lambda model: type(model.model.norm).__name__ == "RMSNorm",
)
CASTS_LAST = Need(
    "norms cast before they multiply by their weight already",
    lambda model: not CASTS_FIRST.holds(model),
)
SCALED_SCORES = Need(
    "scores are not scaled", lambda model: attentions(model)[0].attend.scale != 1.0
)
SANDWICH = Need(
    "a layer has no norms behind attention and feed-forward",
    lambda model: hasattr(layers(model)[0], "pre_feedforward_layernorm"),
)
NO_SANDWICH = Need(
    "a layer has norms behind attention and feed-forward already",
    lambda model: not SANDWICH.holds(model),
)
OFFSET = Need(
    "norms multiply by their weight and not by 1 + weight",
    lambda model: type(model.model.norm).__name__ == "UnitOffsetRMSNorm",
)
NO_OFFSET = Need("norms multiply by 1 + weight already", lambda model: not OFFSET.holds(model))
SCALED_EMBEDDING = Need(
    "the embedding is not scaled", lambda model: hasattr(model.model.embed_tokens, "embed_scale")
)
TIED = Need(
    "the head is not tied", lambda model: model.lm_head.weight is model.model.embed_tokens.weight
)
UNTIED = Need("the head is tied", lambda model: not TIED.holds(model))
BIASES = Need("attention has no biases", _has_bias)
SQUARE = Need(
    "no matrix is square",
    lambda model: len({*attentions(model)[1].o_proj.weight.shape}) == 1,
)
ONE_KEY_A_QUERY = Need(
    "q_proj and k_proj differ in shape", lambda model: len({*_heads(model)}) == 1
)
GROUPED = Need(
    "heads are not grouped, or all in one group",
    lambda model: 1 < _heads(model)[1] < _heads(model)[0],
)
MANY_LAYERS = Need("no more than ten layers", lambda model: len(layers(model)) > 10)
SLIDING = Need("no layer slides", lambda model: any(windows(model)))
BOTH_KINDS = Need("all layers are of one type", lambda model: len({*windows(model)}) > 1)
TABLES_BY_TYPE = Need("all layers share one rotary table", lambda model: len(tables(model)) > 1)
SCALED_ROPE = Need("no rotary scaling", lambda model: _rope_type(model) != "default")
OTHER_SCALE = Need(
    "scores are scaled by head_dim ** -0.5",
    lambda model: attentions(model)[0].attend.scale != model.config.head_dim**-0.5,
)
HEADS_BESIDE_HIDDEN = Need(
    "head_dim is hidden_size / heads",
    lambda model: model.config.head_dim * _heads(model)[0] != model.config.hidden_size,
)
SOFT_CAP = Need(
    "logits have no soft cap",
    lambda model: getattr(model.config, "final_logit_softcapping", None) is not None,
)
NO_SOFT_CAP = Need("logits have a soft cap already", lambda model: not SOFT_CAP.holds(model))


def acts_by(*names: str) -> Need:
    """The feed-forward's activation is one of these functions."""
    otherwise = f"the feed-forward is not gated by {' or '.join(names)}"
    return Need(otherwise, lambda model: activation(model) in names)


def activation(model: Model) -> str:
    """The function that gates its feed-forwards, by its name."""
    found = next(iter(feed_forwards(model).values()), None)
    if found is None:
        return "none: there are experts alone"
    return str(getattr(getattr(found, "act", None), "__name__", "gelu_tanh"))
