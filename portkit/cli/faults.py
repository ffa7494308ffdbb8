"""`portkit faults`: would this probe have caught the mistakes that ports make?

Knows options and streams; the catalogue and the matrix are in `portkit.parity`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from portkit.cli import options, parity
from portkit.cli.output import plural, print_json, say
from portkit.columns import table

if TYPE_CHECKING:
    from portkit.parity.teeth.fates import Teeth

NO_TWIN = "they are moved in portkit's own port, and it has none of this family"
HEADINGS = ("fault", "caught by", "where", "in", "margin")


def command(
    repo: options.Repo,
    *,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    device: options.DeviceOption = options.Device.cpu,
    attention: options.AttentionOption = options.Attention.sdpa,
    gate: parity.GateOption = None,
    prompt: parity.Prompt = None,
    tokens: parity.Tokens = None,
    quick: parity.Quick = False,
    thorough: parity.Thorough = False,
    threads: parity.Threads = 1,
    seed: parity.Seed = 0,
    ignore_config: options.IgnoreConfig = None,
    json: options.Json = False,
) -> None:
    """Try every known porting mistake on the reference, and say which ones a probe catches."""
    choose = parity.probe_choice(prompt, tokens, quick, thorough, seed)

    import torch

    from portkit.loading import resolve_device
    from portkit.parity.prove import measure
    from portkit.parity.question import Question
    from portkit.parity.teeth import fates

    where = resolve_device(device)
    torch.set_num_threads(threads)
    passing = gate or (parity.Gate.exact if where.type == "cpu" else parity.Gate.rounding)
    question = Question(
        repo,
        revision=revision,
        dtype=dtype,
        device=str(where),
        attention=attention,
        ignore_config=tuple(ignore_config or ()),
        gate=passing,
        choose_probe=choose,
    )
    probe, found = measure(question, tell=parity.tell)
    parity.tell("")
    if json:
        asked = [] if found.config is not None else [{"name": "config", "reason": NO_TWIN}]
        fields = {**fates.as_fields(found), "not_asked": asked}
        print_json("faults", gate=passing, probe=probe.name, **fields)
    else:
        say(f"{repo}: the {probe.name} probe at the gate {passing} {found.line}")
        _print(found)
    if any((one.survived or "").startswith("beyond") for one in found.survived):
        raise typer.Exit(3)


def _print(found: Teeth) -> None:
    rows = [
        (
            one.fault.id,
            one.killed_by or "",
            one.first_site or "",
            f"{one.first_pass}, {one.dtype}",
            "" if one.margin is None else f"{one.margin:.1e}",
        )
        for one in found.fates
        if one.killed
    ]
    print(f"\n{table([HEADINGS, *rows])}")
    for one in found.survived:
        say(f"survived: {one.fault.id} ({one.survived})")
    if found.config is None:
        say(f"not asked: fields of the config ({NO_TWIN})")
    else:
        print("\nfields of the config, and where another value of each is seen:")
        for field in found.config:
            say(f"  {field.field}: {'not seen: ' if field.seen is False else ''}{field.by}")
    if found.without_recipe:
        print("\nkinds of sites that have no recipe, at which no fault was tried:")
        say("  " + ", ".join(found.without_recipe))
    others = [one.fault.id for one in found.fates if not one.applies]
    print(f"\n{plural(len(others), 'fault')} not applicable to this model and dtype:")
    say("  " + ", ".join(others))
