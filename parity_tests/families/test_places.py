"""Whatever a family computes has a place: what runs in the reference is observed, and a piece that
is wrong is named as itself, not as what comes behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from portkit.loading import LoadedModel, load
from portkit.nn.mlp import gelu_tanh
from portkit.nn.moe import ByChoice
from portkit.parity.comparing import compare
from portkit.parity.probes.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between, sites_of

ONE_OF_EACH = [
    "llama3",
    "qwen2",
    "qwen3",
    "qwen3 moe",
    "llama4 scout",
    "gemma3",
    "smollm3",
    "gemma3n",
    "cohere2",
]
SEEN_OTHERWISE = re.compile(
    r"(model)?"  # the whole: its logits, its rotary tables
    r"|model\.rotary_emb"  # `model#cos` and `model#sin`
    r"|.*\.(act_fn|activation_fn)"  # what is multiplied by it is `down_proj:in`, or an expert's
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_module_that_the_reference_runs_is_a_site(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    folder = tiny_checkpoint(name, torch.float32)
    reference, table = (
        load_reference(folder, torch.float32),
        sites_of(load(folder).model),
    )
    ran: set[str] = set()
    for site, module in reference.module_sites().items():
        module.register_forward_pre_hook(lambda *_, site=site: ran.add(site))
    assert reference.model is not None
    reference.model(input_ids=torch.arange(14).view(2, 7))
    assert len(ran) > 40
    assert {
        one for one in ran if table.dims(one) is None and not SEEN_OTHERWISE.fullmatch(one)
    } == set()


def _without_the_streams(altup: Any) -> None:
    predict = altup.predict
    altup.predict = lambda hidden_states: predict(hidden_states) - hidden_states


def _correction_without_one(altup: Any) -> None:
    correct = altup.correct

    def wrong(predictions: Tensor, activated: Tensor) -> Tensor:
        return correct(predictions, activated) - (activated - predictions[altup.active])

    altup.correct = wrong


def _unscaled(model: Any) -> None:
    model.per_layer_input_scale.fill_(1.0)


def _feed_forward_without_its_residual(layer: Any) -> None:
    def forward(
        streams: Tensor,
        per_layer_input: Tensor,
        position_embeddings: Any,
        mask: Any,
        cache: Any,
        shared: Any,
    ) -> Tensor:
        predictions = layer.altup.predict(streams)
        h = predictions[layer.altup.active]
        x = layer.input_layernorm(h)
        laurel = layer.laurel(x)
        attended = layer.self_attn(x, position_embeddings, mask, cache, shared)
        h = h + layer.post_attention_layernorm(attended)
        h = layer.pre_feedforward_layernorm((h + laurel) / math.sqrt(2))
        streams = layer.altup.correct(predictions, layer.post_feedforward_layernorm(layer.mlp(h)))
        h = streams[layer.altup.active] * layer.altup.correct_output_scale
        h = gelu_tanh(layer.per_layer_input_gate(h)) * per_layer_input
        h = layer.post_per_layer_input_norm(layer.per_layer_projection(h))
        return torch.cat((streams[:1], streams[1:] + h))

    layer.forward = forward


def _weights_on_the_output(block: Any) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        routing = block.router(x)
        experts, order = routing.experts.sort(dim=1)
        values = x[:, None].expand(*experts.shape, -1)
        made = block.experts(ByChoice(values, experts, routing.logits.shape[1])).values
        routed = (made * routing.weights.gather(1, order)[..., None]).sum(1)
        whole: Tensor = block.shared_expert(x) + routed
        return whole

    replace_forward(block, forward)


def _other_activation(experts: Any) -> None:
    experts.act = torch.relu


def _other_epsilon(attention: Any) -> None:
    attention.qk_norm.eps = 1e-3


LAYER = "model.layers.1"
WRONG: dict[str, tuple[str, str, Callable[[Any], None], str]] = {
    "predict": ("gemma3n", f"{LAYER}.altup", _without_the_streams, f"{LAYER}.altup#predict"),
    "correct": ("gemma3n", f"{LAYER}.altup", _correction_without_one, f"{LAYER}.altup#correct"),
    "what is corrected by": (
        "gemma3n",
        LAYER,
        _feed_forward_without_its_residual,
        f"{LAYER}.altup#correct:in.activated",
    ),
    "per-layer inputs": ("gemma3n", "model", _unscaled, "model.layers.0:in.per_layer_input"),
    "weighing": (
        "llama4 crowded",
        f"{LAYER}.feed_forward",
        _weights_on_the_output,
        f"{LAYER}.feed_forward.experts:in",
    ),
    "an expert": (
        "llama4 crowded",
        f"{LAYER}.feed_forward.experts",
        _other_activation,
        f"{LAYER}.feed_forward.experts",
    ),
    "a norm behind the rotation": (
        "llama4 scout",
        f"{LAYER}.self_attn",
        _other_epsilon,
        f"{LAYER}.self_attn.qk_norm",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_piece_is_named_as_itself(name: str, tiny_checkpoint: CheckpointMaker) -> None:
    family, module, plant, site = WRONG[name]
    folder = tiny_checkpoint(family, torch.bfloat16)
    loaded: LoadedModel = load(folder)
    plant(loaded.model.get_submodule(module))
    probe = quick_probe(loaded.model)
    port = PortSide(loaded.model, probe.longest)
    reference = load_reference(folder, torch.bfloat16)
    result = compare(port, reference, sites_between(port, reference), probe)
    assert result.culprits[0].site == site, [one.site for one in result.culprits[:5]]
