"""Hooks: every listener is called, each isolated from the others (pluggy, project name `nemo_rl`)."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import pluggy

from nemo_rl_core import hookspecs
from nemo_rl_core.errors import NemoRLError, PluginBroken, PluginError, PluginFailed, PluginIncompatible
from nemo_rl_core.registry._current import Lookup, current
from nemo_rl_core.registry._escapes import comes_from_outside, is_escape, text_of
from nemo_rl_core.registry._hook_plugin import HookFailure, HookPlugin
from nemo_rl_core.registry._reference import ComponentRef, import_path
from nemo_rl_core.registry._trace import failure_of, mark, trace_event
from nemo_rl_core.registry.discovery._compatibility import incompatibility
from nemo_rl_core.registry.discovery._importing import importing
from nemo_rl_core.registry.discovery._index import DENY_VARIABLE, Entry

__all__ = ["HookPlugins", "RunHooks"]

logger = logging.getLogger("nemo_rl_core.registry")

_PREFIXES = ("on_", "nemo_rl_")
_DEFAULT_OPTIONS = {
    "wrapper": False,
    "hookwrapper": False,
    "optionalhook": False,
    "tryfirst": False,
    "trylast": False,
    "specname": None,
}

SPECS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)
    for name, function in vars(hookspecs).items()
    if hasattr(function, "nemo_rl_spec")
}
"""Every hook and its arguments."""


class _Listeners(pluggy.PluginManager):
    """Takes an undecorated method that has a hook's name for an implementation of it."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        options = super().parse_hookimpl_opts(plugin, name)
        if options is None and name in SPECS and _is_own_function(plugin, name):
            return dict(_DEFAULT_OPTIONS)
        return options


def _is_own_function(listener: object, name: str) -> bool:
    found = inspect.getattr_static(listener, name, None)
    if isinstance(listener, ModuleType):  # what a module imports is not its own
        return inspect.isfunction(found) and found.__module__ == listener.__name__
    return isinstance(found, staticmethod | classmethod) or inspect.isroutine(found)


class HookPlugins:
    """Listeners that are called together.

    Args:
        plugins: In the order in which they are called (`tryfirst` and `trylast` go before and after).

    Raises:
        PluginError: A listener has a method that looks like a hook but is not one, or asks for an argument
            that its hook does not have.
    """

    def __init__(self, plugins: Sequence[HookPlugin] = ()) -> None:
        self.plugins = tuple(plugins)
        self.failures: list[HookFailure] = []
        self._warned: set[tuple[str, str]] = set()
        self._names = {f"{number}: {plugin.label}": plugin for number, plugin in enumerate(plugins)}
        self._manager = _Listeners("nemo_rl")
        self._manager.add_hookspecs(hookspecs)
        for name, plugin in reversed(self._names.items()):  # pluggy calls the last one registered first
            self._register(name, plugin)

    @classmethod
    def installed(cls, registry: Lookup) -> HookPlugins:
        """The hook plugins of every admitted distribution.

        One that cannot be imported or is malformed is named in one warning and left out.

        Raises:
            PluginBroken: The registry is strict and one is broken.
        """
        sound: list[HookPlugin] = []
        for entry in registry.index.hooks():
            try:
                plugin = _load(registry, entry)
                cls([plugin])  # what is wrong with one must not keep the others out
            except PluginError as error:
                if registry.strict:
                    raise
                logger.warning("%s", error)
            else:
                sound.append(plugin)
        return cls(sound)

    @classmethod
    def of(cls, registry: Lookup, entry: Entry) -> HookPlugins:
        """One installed hook plugin alone.

        Raises:
            PluginError: It cannot be imported, does not fit this core, or is malformed.
        """
        return cls([_load(registry, entry)])

    def call_each(self, hook: str, /, **arguments: object) -> Iterator[tuple[HookPlugin, Any]]:
        """Call every listener of a hook; yield who answered and what, without the Nones.

        A listener that raises is named in one warning and passed over, unless it is critical: then its
        exception propagates with a note that names it.
        """
        if hook not in SPECS:
            raise PluginError(f"There is no hook {hook!r}.{_suggest(hook)}")
        if len(arguments) != len(SPECS[hook]) or not arguments.keys() <= set(SPECS[hook]):
            raise TypeError(f"hook {hook} takes {', '.join(SPECS[hook])}; got {', '.join(arguments)}")
        for impl in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            plugin = self._names[impl.plugin_name]
            started = time.perf_counter()
            failure: Exception | None = None
            try:
                result = _answer(plugin, hook, impl.function(**_subset(impl.function, arguments)))
            except BaseException as error:
                if comes_from_outside(error):  # a signal that happened to arrive in a listener
                    raise
                failure = _as_exception(error, plugin, hook)
            trace_event("hook", plugin.provider, hook, time.perf_counter() - started, failure)
            if failure is not None:
                self._failed(plugin, hook, failure)
                continue
            if result is not None:
                yield plugin, result

    def _failed(self, plugin: HookPlugin, hook: str, error: Exception) -> None:
        where = f"{plugin.label}, hook {hook}"
        if plugin.critical:
            error.add_note(f"Raised by {where}, which is critical.")
            mark(error, where, plugin.distribution.name if plugin.distribution is not None else None)
            raise error
        self.failures.append(HookFailure(plugin.label, hook, error))
        level = logging.DEBUG if (plugin.label, hook) in self._warned else logging.WARNING
        self._warned.add((plugin.label, hook))
        logger.log(
            level,
            "%s: %s: %s (The run goes on; later failures of this listener are not shown.)",
            where,
            type(error).__name__,
            text_of(error).removeprefix(f"{where}: "),
            exc_info=error if logger.isEnabledFor(logging.DEBUG) else None,
        )

    def _register(self, name: str, plugin: HookPlugin) -> None:
        _validate(plugin)
        try:
            self._manager.register(plugin.listener, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{plugin.label}: {error}") from error
        except ValueError as error:
            raise PluginError(f"{plugin.label} is given twice.") from error


class RunHooks(HookPlugins):
    """The listeners of one run: the installed hook plugins, then the run's callbacks in their order.

    Args:
        callbacks: Objects (usually `Callback`s), classes to make without arguments, names of installed
            `callbacks` components, or references to them.
        registry: Where names and installed plugins are looked up; None is the registry of the process.
        installed: Whether installed hook plugins listen too.

    Raises:
        PluginError: See `HookPlugins`, and everything `Registry.resolve` raises.
    """

    def __init__(
        self, callbacks: Iterable[Any] = (), *, registry: Lookup | None = None, installed: bool = True
    ) -> None:
        if registry is None:
            registry = current()
        own = registry.hooks.plugins if installed else ()
        super().__init__([*own, *(_callback(registry, each) for each in callbacks)])

    def call(self, hook: str, /, **arguments: object) -> list[Any]:
        """Call every listener of a hook; return what they answered, without the Nones.

        Raises:
            Exception: What a critical listener raised.
        """
        return [result for _, result in self.call_each(hook, **arguments)]


def _callback(registry: Lookup, choice: object) -> HookPlugin:
    name, dist = "", None
    if isinstance(choice, str | ComponentRef):
        ref = registry.resolve("callbacks", choice)
        name, dist = ref.name, registry.distribution(ref.distribution) if ref.distribution else None
        choice = ref.load()
    listener = _made(choice) if isinstance(choice, type) else choice
    cls = type(listener)
    return HookPlugin(f"callback {cls.__module__}.{cls.__qualname__}", listener, dist, name, is_callback=True)


def _answer(plugin: HookPlugin, hook: str, answer: object) -> object:
    """What a listener answered; those who hand something over must do so by name."""
    if hook.startswith("nemo_rl_") and answer is not None and not isinstance(answer, Mapping):
        raise PluginError(
            f"{plugin.label}, hook {hook}: it returned a {type(answer).__name__}; it must return a mapping by name, "
            "or None."
        )
    return answer


def _as_exception(error: BaseException, plugin: HookPlugin, hook: str) -> Exception:
    """The exception, or what stands for one that may not go on."""
    if isinstance(error, Exception) and not is_escape(error):
        return error
    failure: PluginFailed = failure_of(error, plugin.provider, hook)
    failure.__cause__ = error
    return failure


def _made(cls: type) -> object:
    try:
        return cls()
    except BaseException as error:
        if comes_from_outside(error):
            raise
        found = f"{type(error).__name__}: {text_of(error)}"
        raise PluginError(
            f"Making {cls.__module__}.{cls.__qualname__} without arguments raised {found}. "
            "Pass an object instead of the class."
        ) from error


def _load(registry: Lookup, entry: Entry) -> HookPlugin:
    dist = entry.distribution
    label = f"plugin {entry.name} {dist.version} (dist {dist.name})"
    remedy = f"To disable it: {DENY_VARIABLE}={dist.name}"
    problem = entry.problem or incompatibility(registry.index, dist, None)
    if problem is not None:
        raise PluginIncompatible(f"{label}: {problem}. {remedy}")
    try:
        with importing(label):
            listener = import_path(entry.value)
            listener = listener() if isinstance(listener, type) else listener
    except BaseException as error:
        if comes_from_outside(error):
            raise
        found = str(error) if isinstance(error, NemoRLError) else f"{type(error).__name__}: {text_of(error)}"
        raise PluginBroken(f"{label}: importing {entry.value} raised {found}. {remedy}") from error
    return HookPlugin(label, listener, dist, entry.name)


def _validate(plugin: HookPlugin) -> None:
    """Refuse what would silently never be called, or fail at the first call."""
    for name in dir(plugin.listener):
        found = inspect.getattr_static(plugin.listener, name, None)
        options = getattr(getattr(found, "__func__", found), "nemo_rl_impl", None) or {}
        looks_like_one = name.startswith(_PREFIXES) and _is_own_function(plugin.listener, name)
        hook = options.get("specname") or name
        if hook in SPECS and (options or looks_like_one):
            _validate_implementation(plugin, name, hook, options)
        elif (options or looks_like_one) and not options.get("optionalhook"):
            raise PluginError(
                f"{plugin.label}: {name!r} is no hook.{_suggest(hook)} "
                "Names that begin with on_ or nemo_rl_ are hooks; rename it if it is not a hook."
            )
        elif name in SPECS and not isinstance(plugin.listener, ModuleType) and not isinstance(found, property):
            raise PluginError(f"{plugin.label}: {name!r} has a hook's name but is {found!r}, not a function.")


def _validate_implementation(plugin: HookPlugin, name: str, hook: str, options: Mapping[str, Any]) -> None:
    function = getattr(plugin.listener, name)
    if options.get("wrapper") or options.get("hookwrapper"):
        raise PluginError(f"{plugin.label}: {name} is a wrapper; listeners of this framework cannot wrap each other.")
    if inspect.iscoroutinefunction(function):
        raise PluginError(f"{plugin.label}: {name} is async; hooks are called, not awaited. Write a plain function.")
    for parameter in inspect.signature(function).parameters.values():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.name not in SPECS[hook]:
            close = get_close_matches(parameter.name, SPECS[hook], n=1)
            fix = f" Did you mean {close[0]!r}?" if close else ""
            raise PluginError(
                f"{plugin.label}: {name} asks for {parameter.name!r}, "
                f"which hook {hook} does not have. It has: {', '.join(SPECS[hook]) or 'nothing'}.{fix}"
            )


def _subset(function: Callable[..., object], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _suggest(name: str) -> str:
    close = get_close_matches(name, SPECS, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" The hooks are: {', '.join(SPECS)}."
