"""The steps a model is made of, by name: what `preprocess`, `run` and `postprocess` in a
`model.yaml` can say. Custom steps come by the entry point group `headrace.steps`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from pipelines.bundle import Bundle
from schemas.errors import InvalidModel

Kind = Literal["preprocess", "run", "postprocess"]
Step = Callable[..., Any]
Factory = Callable[..., Step]
"""`factory(bundle, **params) -> step`, called once per loaded model."""
F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINTS = "headrace.steps"

_MODULES = ("forward", "answers", "image", "tensor", "text", "audio", "speech")
"""Searched in this order and imported only as far as needed."""

_factories: dict[tuple[Kind, str], Factory] = {}


class Steps(NamedTuple):
    """A model's steps, made. preprocess: payload bytes to a row, one after the other.
    run: a batch through the engines. postprocess: a row to an answer, one after the other."""

    preprocess: list[Step]
    run: Step
    postprocess: list[Step]


def preprocess_step(name: str) -> Callable[[F], F]:
    """Register a factory of steps `(value) -> value`. The first step of a model gets the payload's
    bytes, the last returns a row: dict[engine input, ndarray without batch axis]."""
    return _register("preprocess", name)


def run_step(name: str) -> Callable[[F], F]:
    """Register a factory of steps `(engines: dict[str, Engine], inputs: dict[str, ndarray]) ->
    dict[str, ndarray]`; axis 0 is the batch on both sides."""
    return _register("run", name)


def postprocess_step(name: str) -> Callable[[F], F]:
    """Register a factory of steps `(value) -> value`. The first gets a row of outputs, the last
    returns the answer, a dict that can be JSON.

    A step may have a method `prepare(model: LoadedModel)`, called once after load.
    """
    return _register("postprocess", name)


def _register(kind: Kind, name: str) -> Callable[[F], F]:
    def keep(factory: F) -> F:
        _factories[kind, name] = factory
        return factory

    return keep


def build_steps(bundle: Bundle) -> Steps:
    """Raises InvalidModel with file and line for an unknown step or a wrong parameter."""
    config = bundle.config
    return Steps(
        [
            _build(bundle, "preprocess", step, f"$.preprocess[{i}]")
            for i, step in enumerate(config.preprocess)
        ],
        _build(bundle, "run", config.run, "$.run"),
        [
            _build(bundle, "postprocess", step, f"$.postprocess[{i}]")
            for i, step in enumerate(config.postprocess)
        ],
    )


def _build(bundle: Bundle, kind: Kind, step: str | dict[str, dict[str, Any]], at: str) -> Step:
    try:
        name, params = _name_and_params(step)
        factory = _find(kind, name)
        return factory(bundle, **_checked(name, factory, params))
    except InvalidModel as error:
        raise InvalidModel(error.code, f"{bundle.where(at)}: {error.message}") from error


def _name_and_params(step: str | dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    if isinstance(step, str):
        return step, {}
    if len(step) != 1:
        raise InvalidModel(
            "model_step_invalid",
            f"a step is `name` or `name: {{parameter: value}}`, came {len(step)} names:"
            f" {', '.join(step) or 'none'}; begin each step with a dash of its own",
        )
    return next(iter(step.items()))


def _find(kind: Kind, name: str) -> Factory:
    for module in _MODULES:
        if (kind, name) in _factories:
            break
        importlib.import_module(f"{__name__}.{module}")
    if factory := _factories.get((kind, name)):
        return factory
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return _load(entry)
    known = sorted(n for k, n in _factories if k == kind)
    custom_names = sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))
    raise InvalidModel(
        "model_step_unknown",
        f"no {kind} step is called `{name}`; there are {', '.join(known)};"
        f" installed by entry point: {', '.join(custom_names) or 'none'}",
    )


def _load(entry: EntryPoint) -> Factory:
    try:
        factory: Factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise InvalidModel(
            "model_step_unknown",
            f"{entry.name}: expected the step at {entry.value}, which cannot be imported: {error}",
        ) from error
    return factory


def _checked(name: str, factory: Factory, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, converted to the types that the factory's signature declares."""
    takes = {p.name: p for p in list(inspect.signature(factory).parameters.values())[1:]}
    required = {p.name for p in takes.values() if p.default is p.empty}
    hints = _hints(factory)
    try:
        if unknown := sorted(params.keys() - takes.keys()):
            raise ValueError(f"has no parameter `{unknown[0]}`")
        if missing := sorted(required - params.keys()):
            raise ValueError(f"needs the parameter `{missing[0]}`")
        return {key: _converted(key, value, hints.get(key, Any)) for key, value in params.items()}
    except ValueError as error:
        words = [_words(parameter, hints.get(key)) for key, parameter in takes.items()]
        raise InvalidModel(
            "model_step_invalid",
            f"{name}: {error}; it takes {', '.join(words) or 'no parameters'}",
        ) from error


def _converted(key: str, value: object, wanted: Any) -> object:
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise ValueError(f"{key}: {error}") from error


def _words(parameter: inspect.Parameter, wanted: Any) -> str:
    """As in `filter (nearest | bicubic) = bicubic`."""
    choices = " | ".join(map(str, get_args(wanted))) if get_origin(wanted) is Literal else ""
    default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
    return f"{parameter.name}{choices and f' ({choices})'}{default}"


def _hints(factory: Factory) -> dict[str, Any]:
    made_by: Any = factory
    try:
        return get_type_hints(
            made_by.__init__ if inspect.isclass(made_by) else made_by, include_extras=True
        )
    except (NameError, TypeError):
        # A custom step may import the types of its signature for the type checker alone, or be
        # an object without any.
        return {}
