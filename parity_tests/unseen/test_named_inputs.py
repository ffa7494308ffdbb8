"""Encoders, towers and encoder-decoders, compared by the inputs that their user names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import portkit.parity
from parity_tests.unseen.conftest import UnseenMaker
from parity_tests.unseen.families import UNSEEN, named_inputs
from parity_tests.unseen.renamed import rename
from portkit.cli import main
from portkit.errors import PortError, PortkitError, ProbeError, ReferenceUnavailable, SiteError
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.named import named_pass
from portkit.parity.reference import load_reference
from portkit.parity.subject.by_inputs import discover_by

FAMILIES = ("bert", "t5", "siglip", "modernbert")
CHANGED = {
    "bert": "bert.encoder.layer.1.output.dense",
    "t5": "decoder.block.1.layer.1.EncDecAttention.k",
    "siglip": "vision_model.encoder.layers.1.mlp.fc1",
    "modernbert": "model.layers.1.mlp.Wi",
}
NEEDS_TOKENS = {"generation", "decoding", "gradients", "known faults"}


def own_class(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return getattr(transformers, UNSEEN[name].own_class).from_pretrained(folder, dtype=dtype).eval()


def given(name: str) -> dict[str, Tensor]:
    return named_inputs(UNSEEN[name], torch.float32)


def modules_that_run(model: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    ran: set[str] = set()
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    with torch.no_grad():
        model(**inputs)
    return ran


@pytest.mark.parametrize(
    "name", [*FAMILIES[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[2:])]
)
def test_a_model_is_exact_under_other_names(name: str, unseen_checkpoint: UnseenMaker) -> None:
    folder = unseen_checkpoint(name)

    def made(directory: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        model = own_class(name, directory, dtype).to(device)
        model.sites = rename(model)
        return model

    result = portkit.parity.compare(made, folder, inputs=given(name))
    assert [one.dtype for one in result.comparisons] == ["float32", "bfloat16"]
    assert (result.verdict, result.culprits) == (Verdict.exact, ())
    ran = modules_that_run(own_class(name, folder), given(name))
    for one in result.comparisons:
        named = {judged.site.partition(":")[0].partition("#")[0] for judged in one.judgements}
        assert ran - {site.partition("@")[0] for site in named} <= {"model.rotary_emb"}
    assert {one.name for one in result.not_verified} >= NEEDS_TOKENS
    assert result.generation is None


@pytest.mark.parametrize(
    "name", [*FAMILIES[:3], pytest.param("modernbert", marks=pytest.mark.slow)]
)
def test_one_changed_weight_is_placed(name: str, unseen_checkpoint: UnseenMaker) -> None:
    folder, dtype = unseen_checkpoint(name), torch.bfloat16
    port = own_class(name, folder, dtype)
    weight = port.get_submodule(CHANGED[name]).weight
    with torch.no_grad():
        weight[3, 5] += 0.5
    result = portkit.parity.compare(port, folder, inputs=given(name), sites=rename(port))
    assert [one.site for one in result.culprits if " " not in one.site] == [CHANGED[name]]
    assert result.verdict is Verdict.diverged
    assert result.culprits[-1].kind == "function"


def test_a_model_at_hand_and_what_it_returns_beside(unseen_checkpoint: UnseenMaker) -> None:
    model, port = (own_class("siglip", unseen_checkpoint("siglip")) for _ in range(2))

    class Scaled(nn.Module):
        sites = rename(port, "port")

        def __init__(self) -> None:
            super().__init__()
            self.port = port

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
            output = self.port(input_ids=input_ids, pixel_values=pixel_values)
            return {**output, "text_embeds": output.text_embeds * 1.01}

    result = portkit.parity.compare(Scaled(), model, inputs=given("siglip"))
    judged = {one.site: one.verdict for one in result.comparisons[0].judgements}
    assert judged["#image_embeds"] is judged["#logits"] is Verdict.exact
    assert judged["#text_model_output.pooler_output"] is Verdict.exact
    assert [one.site for one in result.culprits] == ["#text_embeds"]


def test_dimensions_are_measured(unseen_checkpoint: UnseenMaker) -> None:
    def dims(name: str, **inputs: Tensor) -> Callable[[str], str | None]:
        folder = unseen_checkpoint(name)
        side = load_reference(folder, torch.float32, by_inputs=True)
        return discover_by(side, {**given(name), **inputs}, 251).dims

    of_t5 = dims("t5")
    assert of_t5("#logits") == "batch position vocabulary"
    assert of_t5("encoder") == of_t5("decoder.block.0.layer.1.EncDecAttention.k")
    assert of_t5("decoder.block.0.layer.1:out.1") == "batch stream position key"
    assert of_t5("decoder.block.0.layer.1.EncDecAttention#key") == "batch head position channel"
    of_siglip = dims("siglip")
    assert of_siglip("vision_model.encoder") == "batch patch channel"
    assert of_siglip("vision_model.encoder.layers.0.self_attn#mask") == "batch one patch key"
    assert of_siglip("text_model.encoder") == "batch position channel"
    assert of_siglip("#image_embeds") == "batch channel"
    assert of_siglip("#logits") == "batch length"


def test_images_and_texts_need_not_be_as_many(unseen_checkpoint: UnseenMaker) -> None:
    folder, inputs = unseen_checkpoint("siglip"), given("siglip")
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {
        "input_ids": torch.cat([ids, ids.flip(0)[:1]]),
        "pixel_values": inputs["pixel_values"][:1],
        "attention_mask": torch.cat([mask, mask[:1]]),
    }
    port = own_class("siglip", folder)
    result = portkit.parity.compare(port, folder, inputs=inputs, sites=rename(port))
    assert result.verdict is Verdict.exact
    port = own_class("siglip", folder)
    with torch.no_grad():
        port.vision_model.head.mlp.fc2.bias[1] += 1e-3
    result = portkit.parity.compare(port, folder, inputs=inputs, sites=rename(port))
    assert "vision_model.head.mlp.fc2" in {one.site for one in result.culprits}


def test_padding_is_left_out(unseen_checkpoint: UnseenMaker) -> None:
    """A port that has other tokens where the mask hides them is right, and nowhere else."""

    class Padded(nn.Module):
        def __init__(self, model: nn.Module, hidden: int) -> None:
            super().__init__()
            self.sites = rename(model, "port")
            self.port, self.hidden = model, hidden

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
        ) -> Tensor:
            other = (input_ids + 1) % 251
            ids = torch.where(attention_mask == self.hidden, other, input_ids)
            kinds = token_type_ids
            return self.port(ids, attention_mask=attention_mask, token_type_ids=kinds).logits

    folder = unseen_checkpoint("bert")
    for hidden, verdict in ((0, Verdict.exact), (1, Verdict.diverged)):
        port = Padded(own_class("bert", folder), hidden)
        result = portkit.parity.compare(port, folder, inputs=given("bert"))
        assert result.verdict is verdict, hidden


def test_a_mask_is_that_of_its_tokens() -> None:
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    encoder = {"input_ids": ids, "attention_mask": mask}
    assert named_pass(encoder).real_of_last(4).tolist() == mask.bool().tolist()
    assert bool(named_pass(encoder).real_of_last(5).all())  # of another length
    assert bool(named_pass(encoder).real_of_last(4, 3).all())  # of other rows
    both = {**encoder, "decoder_input_ids": ids}  # as many tokens, and none of them is padding
    assert bool(named_pass(both).real_of_last(4).all())
    own = {**both, "decoder_attention_mask": mask.flip(0)}
    assert bool(named_pass(own).real_of_last(4).all())
    assert not named_pass({**both, "decoder_attention_mask": mask}).real_of_last(4)[0, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_value": torch.ones(2, 3)}, "takes no pixel_value; near: "),
        ({"input_ids": None}, "does not run: it raised ValueError"),
        ({"input_ids": torch.full((2, 9), 251)}, "does not run: it raised IndexError"),
        ({"input_ids": [[1]]}, "input_ids is no tensor"),
    ],
)
def test_a_wrong_name_is_refused_in_a_line(
    change: dict[str, Any], said: str, unseen_checkpoint: UnseenMaker
) -> None:
    folder = unseen_checkpoint("bert")
    inputs = {name: one for name, one in {**given("bert"), **change}.items() if one is not None}
    with pytest.raises(PortkitError, match=said) as raised:
        portkit.parity.compare(own_class("bert", folder), folder, inputs=inputs)
    assert "\n" not in str(raised.value)


def test_a_port_takes_the_same_names(unseen_checkpoint: UnseenMaker) -> None:
    folder = unseen_checkpoint("bert")

    def port(input_ids: Tensor, mask: Tensor) -> Tensor:
        return input_ids * mask

    with pytest.raises(PortError, match=r"takes \(input_ids, mask\) and no token_type_ids"):
        portkit.parity.compare(port, folder, inputs=given("bert"))
    with pytest.raises(PortError, match="go with a port of yours"):
        portkit.parity.compare(None, folder, inputs=given("bert"))
    with pytest.raises(ProbeError, match="leave probe out"):
        portkit.parity.compare(port, folder, inputs=given("bert"), probe="quick")


@pytest.mark.parametrize("name", FAMILIES)
def test_without_inputs_they_are_asked_for(name: str, unseen_checkpoint: UnseenMaker) -> None:
    folder = unseen_checkpoint(name)
    for repo in (folder, own_class(name, folder)):
        with pytest.raises(ReferenceUnavailable, match="give --inputs FILE") as raised:
            portkit.parity.compare(own_class(name, folder), repo)
        assert "\n" not in str(raised.value)


def test_the_command(
    unseen_checkpoint: UnseenMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = unseen_checkpoint("bert")
    save_file(given("bert"), tmp_path / "inputs.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    (tmp_path / "mine.py").write_text(
        "import transformers\n\n\ndef load(directory, dtype, device):\n"
        "    return transformers.BertForMaskedLM.from_pretrained(directory, dtype=dtype)\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(["parity", str(folder), "--port", "mine.py:load", *arguments])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    code, out, _ = run("--inputs", "inputs.safetensors", "--dtype", "bfloat16")
    assert code == 0
    assert "over inputs attention_mask, input_ids, token_type_ids" in out
    assert "not verified: generation (not asked: it needs tokens" in out
    for arguments, said in (
        (("--inputs", "broken.safetensors"), "no safetensors file of named inputs"),
        (("--inputs", "nowhere.safetensors"), "no safetensors file of named inputs"),
        (("--inputs", "inputs.safetensors", "--quick"), "leave --quick out"),
        ((), "give --inputs FILE"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert said in " ".join(err.replace("│", " ").split())


MODELING = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
{needs}

class OwnConfig(PretrainedConfig):
    model_type = "own_of_a_test"

    def __init__(self, vocab_size=31, hidden_size=8, num_hidden_layers=1, **rest):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**rest)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None, **rest):
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))
"""


def with_code(folder: Path, needs: str = "") -> Path:
    """A checkpoint that brings its own code."""
    folder.mkdir()
    torch.manual_seed(0)
    weights = {
        "embed.weight": torch.randn(31, 8),
        "head.weight": torch.randn(31, 8),
        "head.bias": torch.randn(31),
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "modeling_own.py").write_text(MODELING.format(needs=needs))
    (folder / "config.json").write_text(
        '{"model_type": "own_of_a_test", "architectures": ["OwnForCausalLM"], "vocab_size": 31,'
        ' "hidden_size": 8, "num_hidden_layers": 1, "dtype": "float32", "auto_map": {'
        '"AutoConfig": "modeling_own.OwnConfig",'
        ' "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}'
    )
    return folder


class Plain(nn.Module):
    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)
        self.load_state_dict(load_file(folder / "model.safetensors"))

    def forward(self, input_ids: Tensor, positions: Tensor, attention_mask: Any = None) -> Tensor:
        return self.head(self.embed(input_ids))


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tmp_path / "own")
    with pytest.raises(ReferenceUnavailable, match=r"\(modeling_own.py\).*--trust-remote-code"):
        portkit.parity.compare(Plain(folder), folder)
    assert not (tmp_path / "modules").exists()
    result = portkit.parity.compare(Plain(folder), folder, trust_remote_code=True, probe="quick")
    assert (result.culprits, result.comparisons[0].verdict) == ((), Verdict.exact)
    assert {"embed", "head"} <= {one.site for one in result.comparisons[0].judgements}
    said = "the reference ran code of the checkpoint (modeling_own.py), which was trusted"
    assert said in result.notes
    assert said in str(result)


def test_a_package_that_code_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tmp_path / "needing", "import a_package_of_nobody")
    with pytest.raises(ReferenceUnavailable, match="a_package_of_nobody") as raised:
        portkit.parity.compare(Plain(folder), folder, trust_remote_code=True)
    assert "\n" not in str(raised.value)


def test_a_table_that_pairs_nothing_is_no_pass(unseen_checkpoint: UnseenMaker) -> None:
    folder = unseen_checkpoint("bert")
    model, idle = own_class("bert", folder), own_class("bert", folder)
    rename(model)

    class Holding(nn.Module):
        """Holds a model beside the one that it runs."""

        def __init__(self) -> None:
            super().__init__()
            self.idle = idle

        def forward(self, **inputs: Tensor) -> Tensor:
            return model(**inputs).logits

    table = "idle.cls.predictions.decoder = cls.predictions.decoder"
    with pytest.raises(SiteError, match=r"idle\.cls\.predictions\.decoder.*near: idle\.cls"):
        portkit.parity.compare(Holding(), folder, inputs=given("bert"), sites=table)

    def alone(**inputs: Tensor) -> Tensor:
        return model(**inputs).logits

    result = portkit.parity.compare(alone, folder, inputs=given("bert"), dtype="float32")
    assert result.comparisons[0].verdict is Verdict.exact
    assert "where errors are made" in {one.name for one in result.not_verified}
