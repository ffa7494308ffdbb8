"""A run from its inputs to a folder that loads: prepare, build, go on, train, publish.

    RUN/run.json  run.jsonl     what it is; what happened
    RUN/tokenizer/  data/       the tokenizer, the token files
    RUN/steps/                  saved steps
    RUN/model/                  the result, a Hugging Face folder

The same call on the same folder goes on where it was left, with the same result bit for bit. Knows
the order of things; each thing is another file's.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from portkit.checkpoint import CONFIG
from portkit.errors import DataError, TrainingError
from portkit.loading import open_checkpoint, resolve_device
from portkit.tokenizer import Tokenizer
from portkit.training import journal, vocabulary
from portkit.training.beginnings import build, fit_config, read_variant
from portkit.training.evaluation import Evaluation, HeldOut, sample
from portkit.training.interruption import Interruption
from portkit.training.lock import LOCK, only_one
from portkit.training.loop import Trainer
from portkit.training.order import Order
from portkit.training.preparation import Corpus, divide, prepare
from portkit.training.publish import publish
from portkit.training.ranks import Ranks, joined
from portkit.training.recipe import Habits, Recipe
from portkit.training.saves import Saves
from portkit.training.texts import find_texts
from portkit.training.tokens import TokenFile

BPE, CHARACTERS = "bpe", "characters"
_PARTS = {"data", "tokenizer", "tensorboard", LOCK}

Watch = Callable[[Mapping[str, Any]], None]
"""Told each record of `run.jsonl` as it is written, on the first rank."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is trained, and on which text. Words as the command line has them."""

    config: str
    data: str
    held_out: str | None = None
    text_key: str | None = None
    """Which value of a record is its text, where the text comes in records."""
    tokenizer: str = BPE
    """`bpe`, `characters`, or a checkpoint whose tokenizer and vocabulary are taken."""
    vocab_size: int | None = None
    """Of a trained BPE; by default what the config says."""
    device: str = "auto"
    dtype: str = "float32"
    """Of the published weights."""


@dataclass(frozen=True)
class Outcome:
    """Where the model is, how good it is on the held-out text, and how long this call took."""

    model: Path
    num_parameters: int
    steps: int
    evaluation: Evaluation
    seconds: float


@dataclass(frozen=True)
class _Prepared:
    """What the first rank has made, for all ranks to read."""

    config: dict[str, Any]
    train: Path
    held_out: Path


def train(
    inputs: Inputs,
    recipe: Recipe,
    folder: Path,
    habits: Habits | None = None,
    watch: Watch = lambda _: None,
) -> Outcome:
    """Train, or go on training, in `folder`. Raises a PortkitError; what was saved stays.

    SIGTERM and Ctrl-C end it after the step at hand is saved, with KeyboardInterrupt.
    """
    started = time.perf_counter()
    habits = habits or Habits()
    with ExitStack() as held:
        ranks = held.enter_context(joined(resolve_device(inputs.device)))
        prepared = None
        with ranks.first_does() as first:
            if first:
                _refuse_foreign(folder)
                held.enter_context(only_one(folder))
                prepared = _prepare(inputs, recipe, folder, watch)
        prepared = ranks.tell(prepared)
        assert prepared is not None
        session = _Session(prepared, recipe, habits, folder, ranks, watch)
        with Interruption() as interruption:
            evaluation = session.run(interruption)
        target = folder / "model"
        publish(session.trainer, prepared.config, folder / "tokenizer", target, inputs.dtype)
    return Outcome(
        target,
        sum(parameter.numel() for parameter in session.trainer.model.parameters()),
        recipe.steps,
        evaluation,
        time.perf_counter() - started,
    )


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file: name a new folder with --out")
    begun = journal.read_run(folder) is not None
    if folder.exists() and not begun and {one.name for one in folder.iterdir()} - _PARTS:
        raise TrainingError(f"{folder} is no run and not empty: name a new folder with --out")


def _prepare(inputs: Inputs, recipe: Recipe, folder: Path, watch: Watch) -> _Prepared:
    """Tokenizer, token files, fitted config and `run.json`; checked against an earlier beginning.

    Raises a PortkitError before anything is changed where they are not the earlier ones.
    """
    earlier = journal.read_run(folder)
    raw = read_variant(inputs.config)
    texts, held_out = find_texts(inputs.data, inputs.text_key)
    if inputs.held_out is not None:
        held_out, _ = find_texts(inputs.held_out, inputs.text_key)
    if inputs.text_key is not None and not any(
        one and one.has_records for one in (texts, held_out)
    ):
        raise DataError(f"--text-key {inputs.text_key}: plain text has no keys, leave it out")
    corpora = divide(texts, held_out)
    data = {one.part: one.survey.sha256 for one in corpora}
    if earlier is not None and earlier["data"] != data:
        raise TrainingError(
            f"the text is not what {folder} began with (its digest has changed): bring the old "
            "text back, or begin a new run with another --out"
        )
    tokenizer, vocab_size = _tokenizer(inputs, raw, corpora[0], folder, earlier)
    config = fit_config(raw, tokenizer, recipe.context, vocab_size)
    asked = {"tokenizer": inputs.tokenizer, "vocab_size": inputs.vocab_size}
    identity = {"config": config, "data": data, "asked": asked, "recipe": asdict(recipe)}
    if earlier is not None:
        _refuse_another(identity, earlier, recipe, folder)
    tokenizer_sha256 = vocabulary.digest(folder / "tokenizer")

    def progress(part: str, done: float) -> None:
        watch({"event": "preparing", "step": 0, "part": part, "done": done})

    files = [
        prepare(one, tokenizer, tokenizer_sha256, folder / "data", progress) for one in corpora
    ]
    Order(files[0], recipe.context, recipe.seed)  # refuses a text that is too short
    if earlier is None:
        versions = {one: version(one) for one in ("portkit", "torch", "numpy", "tokenizers")}
        facts = {"versions": versions, "command": sys.argv}
        journal.write_run(folder, identity | {"tokenizer_sha256": tokenizer_sha256} | facts)
    return _Prepared(config, *(one.path for one in files))


def _tokenizer(
    inputs: Inputs,
    raw: Mapping[str, Any],
    corpus: Corpus,
    folder: Path,
    earlier: Mapping[str, Any] | None,
) -> tuple[Tokenizer, int]:
    """The run's tokenizer, made if the run is new, and how many rows the model has for it."""
    home = folder / "tokenizer"
    if earlier is not None:
        found = vocabulary.digest(home)
        if found != earlier["tokenizer_sha256"]:
            raise TrainingError(
                f"{home} is not the tokenizer that the run began with: bring it back from a copy"
            )
        return vocabulary.open_folder(home), earlier["config"]["vocab_size"]
    if inputs.vocab_size is not None and inputs.tokenizer != BPE:
        raise TrainingError(
            f"--vocab-size goes with --tokenizer {BPE}: {inputs.tokenizer} has a size of its own"
        )
    shutil.rmtree(home, ignore_errors=True)
    if inputs.tokenizer == CHARACTERS:
        # Of all the text, as is usual: a character that only the held-out part has is no surprise.
        vocabulary.train_characters(corpus.texts.documents(), home)
    elif inputs.tokenizer == BPE:
        size = inputs.vocab_size or raw.get("vocab_size") or 0
        vocabulary.train_bpe(corpus.documents(), size, home)
    else:
        checkpoint = open_checkpoint(inputs.tokenizer)
        vocabulary.copy_tokenizer(checkpoint.files, home)
        if checkpoint.files.has(CONFIG):
            text = checkpoint.config.get("text_config") or checkpoint.config
            return vocabulary.open_folder(home), text.get("vocab_size") or 0
    tokenizer = vocabulary.open_folder(home)
    return tokenizer, tokenizer.vocab_size


def _refuse_another(
    identity: Mapping[str, Any], earlier: Mapping[str, Any], recipe: Recipe, folder: Path
) -> None:
    different = recipe.differences(earlier["recipe"])
    for part in ("asked", "config"):
        now, before = identity[part], earlier[part]
        different += [
            f"{key} {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(now.keys() | before.keys())
            if before.get(key) != now.get(key)
        ]
    if different:
        raise TrainingError(
            f"{folder} was begun otherwise ({'; '.join(different[:3])}): use the same settings to "
            "go on, or begin a new run with another --out"
        )


class _Session:
    """One process's part in one call: the trainer, where it stands, and what it tells."""

    def __init__(
        self,
        prepared: _Prepared,
        recipe: Recipe,
        habits: Habits,
        folder: Path,
        ranks: Ranks,
        watch: Watch,
    ) -> None:
        self._recipe, self._habits, self._ranks = recipe, habits, ranks
        train_tokens = TokenFile(prepared.train)
        order = Order(train_tokens, recipe.context, recipe.seed)
        model = build(prepared.config, recipe.seed, ranks.device)
        self.trainer = Trainer(model, recipe, order, ranks)
        self._held_out = HeldOut(
            TokenFile(prepared.held_out), recipe.context, habits.eval_tokens, self.trainer.rows
        )
        self._tokenizer = vocabulary.open_folder(folder / "tokenizer")
        notes: list[str] = []
        self._saves = Saves(folder / "steps", habits.keep, ranks, notes.append)
        self.step = self._saved = self._saves.load(self.trainer.state)
        self._journal = journal.Journal(folder, self.step) if ranks.first else None
        self._watch = watch
        for note in notes:
            self._tell("note", text=note)
        if self.step:
            self._tell("note", text=f"going on from step {self.step} of {recipe.steps}")
        self._started = time.perf_counter()

    def run(self, interruption: Interruption) -> Evaluation:
        """Train to the end; returns the last evaluation."""
        recipe, habits = self._recipe, self._habits
        first, evaluation = self.step, None
        try:
            while self.step < recipe.steps:
                self._take_step(first)
                last = self.step == recipe.steps
                stop = self._ranks.any(interruption.requested)
                if last or stop or self.step % habits.save_every == 0:
                    self._save()
                if stop and not last:
                    raise KeyboardInterrupt
                if habits.eval_every and self.step % habits.eval_every == 0:
                    evaluation = self._evaluate()
                if habits.sample_every and self.step % habits.sample_every == 0:
                    self._sample()
            if evaluation is None or self.step % habits.eval_every:
                evaluation = self._evaluate()
        finally:
            if self._journal is not None:
                self._journal.close()
        return evaluation

    def _take_step(self, first: int) -> None:
        started = time.perf_counter()
        try:
            result = self.trainer.step(self.step)
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._safe()}") from error
        self.step += 1
        now = time.perf_counter()
        per_step_s = (now - self._started) / (self.step - first)
        tokens = self._recipe.batch_size * self._recipe.context
        self._tell(
            "step",
            **asdict(result),
            tokens_per_s=tokens / (now - started),
            memory_bytes=_peak_memory(self._ranks.device),
            left_s=per_step_s * (self._recipe.steps - self.step),
        )

    def _save(self) -> None:
        if not self.trainer.is_finite():
            raise TrainingError(
                f"the weights are not finite after step {self.step} and were not saved: lower "
                f"--learning-rate; {self._safe()}"
            )
        self._saves.save(self.step, self.trainer.state)
        self._saved = self.step
        self._tell("saved")

    def _safe(self) -> str:
        return f"step {self._saved} is saved" if self._saved else "no step had been saved before"

    def _evaluate(self) -> Evaluation:
        evaluation = self._held_out.evaluate(self.trainer.objective, self._ranks)
        self._tell("evaluation", **asdict(evaluation))
        return evaluation

    def _sample(self) -> None:
        if self._ranks.world > 1:
            return  # a shard alone cannot speak
        prompt, seed = self._habits.sample_prompt, self._recipe.seed
        context = self._recipe.context
        text = sample(self.trainer.model, self._tokenizer, prompt, context, seed)
        self._tell("sample", text=text)

    def _tell(self, event: str, **fields: Any) -> None:
        if self._journal is None:
            return
        record = {"event": event, "step": self.step, **fields}
        self._journal.write(record)
        self._watch(record | {"steps": self._recipe.steps})


def _peak_memory(device: torch.device) -> int:
    """Bytes: what the GPU had allocated at most, or else what the process had resident at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
