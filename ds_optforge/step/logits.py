"""Watches the attention of a model in training, and keeps the largest logit of each key head since the last step.

The logits are computed once more from the queries and keys that a module attends with, since no attention function returns
them: scale * q k^T in float32, of every query in sequences of up to `QUERIES` tokens and of evenly spaced ones in longer
sequences, with all keys that they attend to. Nothing reads a value from the device.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial, reduce
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ds_optforge.errors import ConfigError
from ds_optforge.routing.attention import INTERFACE, Attention, forward_of

logger = logging.getLogger("ds_optforge")

QUERIES = 128  # of a sequence whose logits are computed
_LOGITS = 2**26  # that are in memory at a time

_KNOWN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_HOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # of the last optimizer that watches a module


class LogitWatch:
    """Watcher of the attention of a model, from one optimizer's step to the next.

    Args:
        attentions: by the qualified name of their module.
        wanted: tells whether the next step is to know the largest logits. It is asked once for each step, by the first forward
            pass that computes gradients.
    """

    def __init__(self, attentions: Mapping[str, Attention], wanted: Callable[[], bool]) -> None:
        self._wanted = wanted
        self._on: bool | None = None
        self._turn = 0  # places of the sampled queries take turns
        self._maxima: dict[torch.device, Tensor] = {}
        self._sampled: set[int] = set()  # lengths of sequences that were not looked at whole
        self._count = 0
        for path, attention in attentions.items():
            _install(_Watcher(self, path, attention, self._count), attention.module)
            self._count += attention.key_heads

    def is_on(self) -> bool:
        """Whether the present forward pass is to be watched: it computes gradients, and the next step wants its logits."""
        if not torch.is_grad_enabled():
            return False
        if self._on is None:
            self._on = self._wanted()
        return self._on

    def take(self, device: torch.device) -> Tensor:
        """Return the largest logit of each key head, (key heads of all modules,), and begin anew.

        Args:
            device: of the result.

        Returns:
            Float32; -inf for what was not seen, or was not finite.
        """
        found = [maxima.to(device, non_blocking=True) for maxima in self._maxima.values()]
        self._turn += 1
        self.drop()
        if not found:
            return torch.full((self._count,), -math.inf, device=device)
        return found[0] if len(found) == 1 else torch.stack(found).amax(0)

    def drop(self) -> None:
        """Begin anew: the step did not want to know them."""
        self._maxima, self._on = {}, None

    @torch.no_grad()
    def add(self, start: int, attention: Attention, query: Tensor, key: Tensor, kept: "Kept", scale: float | None) -> None:
        """Take the logits of one call of an attention function into account.

        Args:
            start: number of the attention's first key head among those of all modules.
            attention: that was called.
            query: (batch, heads, tokens, size).
            key: (batch, heads or key heads, tokens, size).
            kept: which keys each query attends to.
            scale: of the logits; None for size ** -0.5.
        """
        maxima = self._maxima.get(query.device)
        if maxima is None:
            maxima = self._maxima[query.device] = torch.full((self._count,), -math.inf, device=query.device)
        step = -(-query.shape[2] // QUERIES)
        if step > 1:
            self._say_sampled(query.shape[2])
        first = self._turn % step
        queries, keys = query.detach()[:, :, first::step], key.detach()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        batch = max(1, _LOGITS // max(1, query.shape[1] * queries.shape[2] * keys.shape[2]))
        mine = maxima.narrow(0, start, attention.key_heads)
        for low in range(0, len(queries), batch):
            part = slice(low, low + batch)
            allowed = kept.of(part, first, step, query.shape[2], keys.shape[2], query.device)
            largest = _largest(queries[part], keys[part], allowed, scale).view(attention.key_heads, -1).amax(1)
            torch.maximum(mine, largest.nan_to_num(-math.inf, -math.inf, -math.inf), out=mine)

    def _say_sampled(self, tokens: int) -> None:
        if tokens not in self._sampled:
            self._sampled.add(tokens)
            spaced = "qk_clip: of a sequence of %d tokens it looks at the logits of up to %d evenly spaced queries"
            logger.info(spaced, tokens, QUERIES)


def _largest(query: Tensor, key: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Return the largest allowed logit of each head of the queries, (heads,) in float32."""
    batch, heads, tokens, size = query.shape
    kind = query.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        grouped = (query.float() * scale).reshape(batch, key.shape[1], -1, size)
        logits = (grouped @ key.float().transpose(2, 3)).view(batch, heads, tokens, -1)
    if allowed is not None:
        logits.masked_fill_(~allowed, -math.inf)
    return logits.amax((0, 2, 3))


class Kept:
    """Which keys each query attends to.

    Args:
        mask: (batch or 1, heads or 1, queries, keys), True or an addend that is not hugely negative where a query attends to
            a key; or (batch, keys), not zero for tokens that are no padding; None for all.
        causal: whether a query attends to its own place and those before it.
        late: whether the last query is at the place of the last key, rather than the first at that of the first.
        window: a query attends to so many places up to its own; None for all.
        places: (batch, tokens) positions; they begin anew with each of several sequences that are packed into one. None if
            nothing is packed.
        ends: (sequences + 1,) where packed sequences begin and end; None if nothing tells.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        causal: bool = False,
        late: bool = False,
        window: int | None = None,
        places: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> None:
        self._mask, self._causal, self._late, self._window = mask, causal, late, window
        self._places, self._ends = places, ends

    def of(self, part: slice, first: int, step: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Return flags for every ``step``-th query from ``first`` on, or None for all.

        Args:
            part: of the batch.
            first, step: which of the queries.
            queries, keys: number of all queries and keys.
            device: of the flags.

        Returns:
            (batch or 1, heads or 1, queries, keys).
        """
        found = list(self._masked(part, first, step, queries))
        rows = torch.arange(first, queries, step, device=device)[:, None]
        if self._late:
            rows = rows + (keys - queries)
        columns = torch.arange(keys, device=device)
        if self._causal:
            found.append((columns <= rows)[None, None])
        if self._window is not None:
            found.append((columns > rows - self._window)[None, None])
        numbers = self._sequences(part, keys, device)
        if numbers is not None:
            found.append((numbers[:, first::step, None] == numbers[:, None, :])[:, None])
        return reduce(torch.logical_and, found) if found else None

    def _masked(self, part: slice, first: int, step: int, queries: int) -> list[Tensor]:
        if self._mask is None:
            return []
        flags = self._mask if self._mask.dtype == torch.bool else _attends(self._mask)
        if flags.dim() == 2:
            flags = flags[part]
            of_keys = flags[:, None, None, :]
            return [of_keys, flags[:, None, first::step, None]] if flags.shape[1] == queries else [of_keys]
        if flags.shape[0] > 1:
            flags = flags[part]
        return [flags[:, :, first::step] if flags.shape[2] > 1 else flags]

    def _sequences(self, part: slice, keys: int, device: torch.device) -> Tensor | None:
        """Return the number of each token's sequence in its row, (batch or 1, tokens)."""
        if self._ends is not None:
            return torch.bucketize(torch.arange(keys, device=device), self._ends.to(device), right=True)[None]
        if self._places is None:
            return None
        places = self._places[part] if len(self._places) > 1 else self._places
        return nn.functional.pad(places[:, 1:] <= places[:, :-1], (1, 0)).cumsum(1)


def _attends(mask: Tensor) -> Tensor:
    """Return where a mask of numbers lets a query attend: not zero for padding, not hugely negative for an addend."""
    if mask.dim() == 2:
        return mask != 0
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask >= 0


class _Watcher:
    """Watcher of one module: its hooks put it between the module and its attention function, for one forward pass."""

    def __init__(self, owner: LogitWatch, path: str, attention: Attention, start: int) -> None:
        self._owner, self._path, self._attention, self._start = ref(owner), path, attention, start
        self._seen = False  # whether it has ever got queries and keys
        self._undo: Callable[[], None] | None = None

    def begin(self, module: nn.Module) -> None:
        """Begin to watch a forward pass, if it is to be watched."""
        owner = self._owner()
        if owner is None or not owner.is_on():
            return
        self.end(module)  # of a pass that another hook ended
        if self._attention.calls_interface:
            self._undo = self._enter_interface(module)
        else:
            self._attention.watch = self._observed
            self._undo = partial(setattr, self._attention, "watch", None)

    def end(self, module: nn.Module) -> None:
        """End what `begin` began.

        Raises:
            ConfigError: the module has never shown its queries and keys.
        """
        if self._undo is None:
            return
        self._undo()
        self._undo = None
        if not self._seen:
            raise self._wrong(
                "a forward pass that shows no queries and keys",
                "one that calls what ds_optforge.register_attention returned, or transformers' attention interface",
            )

    def _enter_interface(self, module: nn.Module) -> Callable[[], None]:
        """Put `_called` in place of the attention function that the module is going to ask for; return what undoes it."""
        names = forward_of(module).__globals__
        interface, default = names[INTERFACE], names.get("eager_attention_forward")
        name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
        if name not in _KNOWN or not hasattr(interface, "get_interface") or (name == "eager" and default is None):
            raise self._wrong(f"the attention implementation '{name}'", f"{', '.join(_KNOWN)}, of transformers 5")
        own = name in interface
        function = interface.get_interface(name, default)
        interface[name] = partial(self._called, name, function)

        def leave() -> None:
            del interface[name]  # this entry of the one interface; behind it is that of the class
            if own and interface.get(name) is not function:
                interface[name] = function

        return leave

    def _called(
        self,
        name: str,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *others: Any,
        **options: Any,
    ) -> Any:
        """Look at what an attention function of transformers is called with, and call it."""
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise self._wrong(f"an attention mask of {type(attention_mask).__name__}", "a tensor")
        flash = name.startswith("flash")
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # The eager function masks by its mask alone, and SDPA's by a mask or else by this flag.
        causal = bool(causal) and query.shape[2] > 1 and (flash or (name == "sdpa" and attention_mask is None))
        packed = flash and attention_mask is None
        kept = Kept(
            attention_mask,
            causal,
            late=flash,
            window=options.get("sliding_window") if flash else None,
            places=options.get("position_ids") if packed else None,
            ends=options.get("cu_seq_lens_q") if packed else None,
        )
        self._add(query, key, kept, options.get("scaling"))
        return function(module, query, key, value, attention_mask, *others, **options)

    def _observed(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> None:
        self._add(query, key, Kept(attn_mask, is_causal), scale)

    def _add(self, query: Tensor, key: Tensor, kept: Kept, scale: float | None) -> None:
        found, owner = self._attention, self._owner()
        alike = query.dim() == key.dim() == 4 and query.shape[3] == key.shape[3] == found.size
        if not alike or query.shape[1] != found.heads or key.shape[1] not in (found.heads, found.key_heads):
            raise self._wrong(
                f"queries {tuple(query.shape)} and keys {tuple(key.shape)}",
                f"(batch, {found.heads}, tokens, {found.size}), and keys of {found.key_heads} or as many heads",
            )
        self._seen = True
        if owner is not None:
            owner.add(self._start, found, query, key, kept, scale)

    def _wrong(self, found: str, allowed: str) -> ConfigError:
        kind = type(self._attention.module).__name__
        return ConfigError(f"qk_clip: {self._path or 'the model'} ({kind}): got {found}; allowed: {allowed}")


@cache
def _refusal() -> Callable[[], None]:
    """`_refuse_compiled`, which torch.compile leaves as it is; made when attention is watched: it loads torch's compiler."""
    refuse: Callable[[], None] = torch.compiler.disable(  # type: ignore[no-untyped-call]
        _refuse_compiled, reason="qk_clip does not work in a compiled forward pass"
    )
    return refuse


def _refuse_compiled() -> None:
    raise ConfigError(
        "qk_clip: got a forward pass that torch.compile has compiled; allowed: one that is not compiled (what a module attends "
        'with is looked at between its projections and its attention function), or no "qk_clip"'
    )


class _Hook:
    """A hook of a watched module, before or after its forward pass; in a copy or a file of the module it does nothing."""

    def __init__(self, call: Callable[[nn.Module], None] | None = None) -> None:
        self._call = call
        self._refuse = _refusal()

    def __call__(self, module: nn.Module, *values: Any) -> None:
        if self._call is None:
            return
        if torch.is_grad_enabled() and torch.compiler.is_compiling():
            self._refuse()
        self._call(module)

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _install(watcher: _Watcher, module: nn.Module) -> None:
    """Watch ``module``, in place of an optimizer that was built for it before."""
    for handle in _HOOKS.pop(module, ()):
        handle.remove()
    before = module.register_forward_pre_hook(_Hook(watcher.begin))
    after = module.register_forward_hook(_Hook(watcher.end), always_call=True)
    _HOOKS[module] = [before, after]
