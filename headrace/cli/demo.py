"""`headrace demo`: three real models from wheels, real inputs through the public client, the answers in a table."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from headrace.cli.jobs import brief_answer, progress_bar
from headrace.cli.output import FAILED, console, handle_errors, output, print_json
from schemas.errors import PipelineError

if TYPE_CHECKING:
    from infra.settings import Settings
    from producers.client import Client, JobHandle
    from schemas.results import Outcome

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
STAGES = ("waited", "load", "decode", "run", "store")


class Input(NamedTuple):
    """One job of the demo. expected: what the answer must hold; empty when any will do."""

    model: str
    payload: Any
    shown: str
    expected: str


@handle_errors
def demo(
    data: Annotated[
        Path | None, typer.Option("--data", help="The stack's folder; one of its own by default.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document a job.")] = False,
) -> None:
    """Make three model bundles, start the stack, run photographs, sentences and speech through it.

    Exit code 0: every answer is right. 1: one is not.
    """
    from infra.settings import load_settings
    from producers.client import Client

    recipes = _recipes()
    settings = load_settings(data_dir=data or recipes.cache / "demo")
    _install_models(settings, recipes)
    with _stack(settings, keep=keep), Client(settings=settings) as client:
        wrong = _run(client, recipes.inputs(), json=json)
        if keep:
            console.print(f"The stack goes on: headrace status --data {settings.data_dir}")
    if wrong:
        raise typer.Exit(FAILED)


class _Recipes(NamedTuple):
    """What `examples/models` offers."""

    bundles: dict[str, Callable[[Path], None]]
    inputs: Callable[[], list[Input]]
    cache: Path


def _recipes() -> _Recipes:
    """Raises PipelineError outside a source checkout: the recipes are examples, not part of the package."""
    if not (CHECKOUT / "examples" / "models").is_dir():
        raise PipelineError(
            "demo_unavailable",
            f"Expected the demo's recipes in {CHECKOUT / 'examples'}; run it from a source checkout.",
        )
    sys.path.insert(0, str(CHECKOUT))
    efficientnet, minilm, samples, wheels, whisper = (
        importlib.import_module(f"examples.models.{name}")
        for name in ("efficientnet", "minilm", "samples", "wheels", "whisper")
    )

    def inputs() -> list[Input]:
        photographs = [
            Input("efficientnet-lite0", path, path.name, samples.PHOTOGRAPHS[path.name])
            for path in samples.photographs()
        ]
        topics = [
            Input("minilm-topics", text, text, topic) for text, topic in samples.SENTENCES.items()
        ]
        vectors = [Input("minilm-embed", text, text, "") for text in samples.sentences()[:2]]
        speech = [
            Input("whisper-tiny-en", path, path.name, said) for path, said in whisper.speech()
        ]
        return photographs + topics + vectors + speech

    bundles = {
        "efficientnet-lite0": efficientnet.build,
        "minilm-embed": minilm.build_embedder,
        "minilm-topics": minilm.build_classifier,
        "whisper-tiny-en": whisper.build,
    }
    return _Recipes(bundles, inputs, wheels.cache_folder().parent)


def _install_models(settings: Settings, recipes: _Recipes) -> None:
    """Make and add what the catalogue does not have yet."""
    from infra.catalogue import Catalogue
    from infra.objects import connect_objects

    objects = connect_objects(settings)
    have = {card.name for card in Catalogue(objects).cards()}
    missing = [name for name in recipes.bundles if name not in have]
    if not missing:
        return
    from pipelines.engines import open_engines
    from pipelines.registry import add

    engines = open_engines(settings, objects)
    with progress_bar() as bar:
        task = bar.add_task("models", total=2 * len(missing))
        for name in missing:
            folder = recipes.cache / "bundles" / name
            bar.update(task, description=f"make {name}")
            recipes.bundles[name](folder)
            bar.advance(task)
            bar.update(task, description=f"add {name}")
            add(folder, objects, engines, budget_bytes=settings.worker.memory_bytes)
            bar.advance(task)


@contextmanager
def _stack(settings: Settings, *, keep: bool) -> Iterator[None]:
    """The embedded stack for the length of the block; one that already runs is used and left alone."""
    from headrace.cli.stack import down, up
    from infra.embedded.record import running_stack

    if running_stack(settings):
        yield
        return
    up(data=settings.data_dir, detach=True)
    try:
        yield
    finally:
        if not keep:
            down(data=settings.data_dir)


def _run(client: Client, inputs: list[Input], *, json: bool) -> int:
    """Publish everything, show outcomes as they arrive, then the table. Returns how many are wrong."""
    began = time.perf_counter()
    jobs: dict[str, tuple[Input, JobHandle]] = {}
    for given in inputs:
        handle = client.submit(given.model, given.payload, tier="standard")
        jobs[handle.id] = (given, handle)
    table = Table("job", "model", "input", "answer", *STAGES)
    wrong = 0
    with progress_bar() as bar:
        task = bar.add_task("results", total=len(jobs))
        for outcome in client.outcomes([handle for _, handle in jobs.values()], TIMEOUT_S):
            given = jobs[outcome.job_id][0]
            right, answer = _answer(client, outcome, given)
            wrong += not right
            _show(table, outcome, given, answer, right)
            if json:
                print_json(_document(outcome, given, answer, right), line=True)
            bar.advance(task)
    if not json:
        output.print(table)
    seconds = time.perf_counter() - began
    console.print(
        f"{len(jobs) - wrong} of {len(jobs)} answers right, {seconds:.2f} s from the first submit; "
        "times per stage in milliseconds."
    )
    return wrong


def _answer(client: Client, outcome: Outcome, given: Input) -> tuple[bool, str]:
    if outcome.status != "succeeded":
        return False, f"{outcome.status}: {outcome.message}"
    answer = client.result_of(outcome).answer
    said = str(answer.get("label") or answer.get("text") or answer.get("dimensions"))
    return not given.expected or _plain(said) == _plain(given.expected), brief_answer(answer)


def _plain(text: str) -> str:
    """Words alone: a transcript is right whatever its commas and capitals."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _show(table: Table, outcome: Outcome, given: Input, answer: str, right: bool) -> None:
    times = outcome.times
    stages = (
        (times.waited_ms, times.load_ms, times.decode_ms, times.run_ms, times.store_ms)
        if times
        else ()
    )
    mark = "[green]✓[/]" if right else f"[red]✗ expected {given.expected}[/]"
    table.add_row(
        outcome.job_id[-8:],
        outcome.model,
        given.shown[:34],
        f"{answer} {mark}",
        *(f"{ms:.1f}" for ms in stages),
    )


def _document(outcome: Outcome, given: Input, answer: str, right: bool) -> dict[str, Any]:
    return {
        "job": outcome.job_id,
        "model": outcome.model,
        "input": given.shown,
        "answer": answer,
        "expected": given.expected or None,
        "right": right,
    }
