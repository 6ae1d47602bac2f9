"""How a checkpoint holds weights: under which key, with what in front of their names, and what stands beside them.

>>> weights, layout, notes = find({"net": {"module.fc.weight": ...}, "epoch": 3}, None, path)
>>> layout.key, layout.prefix, layout.beside
(('net',), 'module.', {'epoch': 3})

A twin goes out in the layout that its original came in; all but what stands beside is in its manifest, under `layout`.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.errors import NormRewriteError, nearest
from normrewrite.outside import CODE, is_name
from normrewrite.provenance import manifest

Weights = nn.Module | dict[str, Tensor]

KEY = "layout"  # in a manifest
USUAL = ("state_dict", "model_state_dict", "model", "ema", "net")
_COMPILED = "_orig_mod"
_WRAPPERS = ("module.", f"{_COMPILED}.")  # of DistributedDataParallel and torch.compile
_COUNTERS = ("n_averaged",)  # of AveragedModel, beside the network's own names
_EXTRA = "_extra_state"  # torch's own name for what a module's get_extra_state gives, which may be anything
_DEEPEST = 8
_ROOM, _PLAIN = 1 << 20, 64  # bytes of one thing that is carried along, and of one value in it


class NoSuchKey(NormRewriteError):
    """The file has no weights under the key that was asked for, or any usual one; another of the command's may."""


@dataclass(frozen=True)
class Layout:
    """key: from the outermost dict in, () where the file is the weights; prefix: in front of every name; compiled: modules, by
    dotted name, behind which torch.compile has put `_orig_mod`.

    beside, among: whatever else is small and plain, beside the weights (nested as it was) and in the same dict; metadata: of
    a .safetensors file; left: names of what is not carried along.
    """

    key: tuple[str, ...] = ()
    prefix: str = ""
    compiled: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)
    among: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network's tensors by the names of the file."""
        return {self.prefix + _with_compiled(name, self.compiled): value for name, value in state.items()}

    def content(self, weights: nn.Module | dict[str, Tensor], record: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a file of torch.save's is to hold: the weights in their place, all that stood beside them, and the manifest."""
        *outer, last = self.key or ("state_dict",)
        whole = dict(self.beside)
        place = whole
        for name in outer:
            place[name] = dict(place.get(name, {}))
            place = place[name]
        place[last] = weights if isinstance(weights, nn.Module) else self.named(weights) | dict(self.among)
        return whole if record is None else whole | {manifest.KEY: record}

    def told(self) -> dict[str, Any]:
        """For the manifest: what differs from weights under `state_dict` by their own names."""
        facts = {"key": list(self.key), "prefix": self.prefix, "compiled": list(self.compiled)}
        usual = {"key": (["state_dict"], []), "prefix": ("",), "compiled": ([],)}
        return {name: value for name, value in facts.items() if value not in usual[name]}


def of(record: object) -> Layout:
    """What a manifest that has been checked tells of the layout."""
    entry = record.get(KEY) if isinstance(record, Mapping) else None
    entry = entry if isinstance(entry, Mapping) else {}
    return Layout(tuple(entry.get("key", ())), entry.get("prefix", ""), tuple(entry.get("compiled", ())))


# --- where the weights are ----------------------------------------------------------------------------------------------------


def find(content: object, key: str | None, path: Path) -> tuple[Weights, Layout, list[str]]:
    """The module or the tensors by the names of their network, how they stood in `content`, and what is to be said of it.

    Raises NoSuchKey, and NormRewriteError where nothing in it is weights.
    """
    known = of(content.get(manifest.KEY) if isinstance(content, Mapping) else None)
    own = known.key if known.key and _at(content, known.key) is not None else ("state_dict",)
    asked = None if key is None else _named(content, key)
    if known.key == own and not asked:
        key, asked = None, own
    if key is not None and asked is None:
        raise _no_such_key(content, key, path)
    notes: list[str] = []
    if asked and not all(isinstance(part, str) for part in asked):  # of a list, say: what goes out has a name
        content, asked = _at(content, asked), None
    keys, weights = _select(content, asked, path, notes)
    beside, left = _beside(content, keys) if isinstance(content, Mapping) and keys else ({}, [])
    layout = Layout(keys, beside=beside, left=tuple(left))
    if isinstance(weights, nn.Module):
        return weights, layout, notes
    if not all(isinstance(name, str) for name in weights):
        raise NormRewriteError(f"{path}: its state_dict has names that are no text. Save model.state_dict().")
    if unfit := next((name for name in weights if not is_name(name)), None):
        raise NormRewriteError(f"{path}: its state_dict has {unfit!r:.80}: {CODE}. Rename the tensor.")
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor) or name.endswith(_EXTRA)}
    others = {name: value for name, value in weights.items() if name not in tensors and name != manifest.KEY}
    layout = replace(layout, left=(*left, *(name for name, value in others.items() if not _is_small(value))))
    others = {name: value for name, value in others.items() if _is_small(value)}
    layout = replace(layout, among=others) if keys else replace(layout, beside=others)
    if keys == own and (known.prefix or known.compiled):
        layout = replace(layout, prefix=known.prefix, compiled=known.compiled)
    else:
        layout = replace(layout, prefix=_wrappers(tensors))
    return *_taken(tensors, layout), notes


def _select(
    content: object, asked: tuple[str, ...] | None, path: Path, notes: list[str]
) -> tuple[tuple[str, ...], Any]:
    """The keys to the module or state_dict in what a checkpoint holds, and that."""
    keys, outermost = asked or (), content
    content = _at(content, keys)
    for _ in range(_DEEPEST + 1):
        if isinstance(content, nn.Module):
            return keys, content
        if not isinstance(content, Mapping):
            holds = f"{path}: --key {'.'.join(keys)}" if keys else f"{path}"
            inner = f"; --key takes one of {_keys(content)}" if isinstance(content, list | tuple) and content else ""
            raise NormRewriteError(
                f"{holds} holds a {type(content).__name__}, neither a module nor a state_dict{inner}."
            )
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return keys, content
        name = next((name for name in USUAL if _leads(content.get(name))), None)
        sets = [str(each) for each, value in content.items() if isinstance(each, str) and _is_weights(value)]
        if name is None and any(isinstance(value, Tensor) for value in content.values()):
            return keys, content
        if name is None and len(sets) == 1:  # the only weights there are, whatever they are called
            name = sets[0]
        if name is None:
            inner = f"; under {'.'.join(keys)}: {_keys(content)}" if keys else ""
            raise NoSuchKey(
                f"{path}: no state_dict under {', '.join(USUAL)}. Name it with --key; keys: {_keys(outermost)}{inner}"
            )
        notes += [_of_others(path, keys, name, others)] if (others := [each for each in sets if each != name]) else []
        keys, content = (*keys, name), content[name]
    raise NormRewriteError(f"{path}: its dictionaries are nested without end. Name the state_dict with --key.")


def _leads(value: object) -> bool:
    """Whether there are weights in it, at any depth; what stands at several places is looked at once."""
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, nn.Module | Tensor):
            return True
        if isinstance(part, Mapping) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values()
    return False


def _named(content: object, key: str) -> tuple[Any, ...] | None:
    """What leads to a dotted key: parts may have dots themselves, the longest first, or be numbers, of a list, too."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        text, rest = ".".join(parts[:count]), ".".join(parts[count:])
        for part in (text, int(text)) if text.isdecimal() and len(text) < 10 else (text,):
            if _has(content, part):
                further = _named(_at(content, (part,)), rest) if rest else ()
                if further is not None:
                    return (part, *further)
    return None


def _has(content: object, part: str | int) -> bool:
    if isinstance(content, list | tuple):
        return isinstance(part, int) and part < len(content)
    return isinstance(content, Mapping) and part in content


def _keys(content: object) -> str:
    """What --key may name in it, as far as that is soon told."""
    keys = content if isinstance(content, Mapping) else range(len(content)) if isinstance(content, list | tuple) else ()
    return ", ".join([str(each) for each in keys][:12])


def _no_such_key(content: object, key: str, path: Path) -> NoSuchKey:
    """Says how far the key leads, and what there is then."""
    done: tuple[Any, ...] = ()
    parts = key.split(".")
    for count in range(1, len(parts)):
        done = _named(content, ".".join(parts[:count])) or done
    inner = _at(content, done)
    part = parts[min(len(done), len(parts) - 1)]
    known = _keys(inner)
    return NoSuchKey(f"{path}: --key {key}: there is no {part!r}.{nearest(part, known.split(', '))} Keys: {known}")


def _at(content: object, keys: Iterable[Any]) -> object:
    for name in keys:
        content = content[name] if _has(content, name) else None  # type: ignore[index]
    return content


def _of_others(path: Path, keys: tuple[str, ...], taken: str, others: list[str]) -> str:
    names = [".".join((*keys, name)) for name in (taken, *others)]
    return f"{path.name}: the weights under {names[0]} were taken; --key takes others that it holds: {', '.join(names[1:5])}"


def _is_weights(value: object) -> bool:
    if isinstance(value, nn.Module):
        return True
    tensors = list(value.values()) if isinstance(value, Mapping) else []
    return all(isinstance(each, Tensor) for each in tensors) and any(each.dim() for each in tensors)


# --- names ----------------------------------------------------------------------------------------------------------------


def fitted(
    state: Mapping[str, Tensor], layout: Layout, wanted: Collection[str]
) -> tuple[dict[str, Tensor], Layout, str]:
    """The tensors by the names of a network that has those `wanted`: without what all their names in the file begin with, and
    without `_orig_mod` inside, where all of them fit then; as they were where nothing does. Also what is to be said of it."""
    file = layout.named(state) | {name: value for name, value in layout.among.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in layout.among.items() if name not in file}
    counters = [name for name in _COUNTERS if name not in wanted]
    names = [name for name in file if name not in counters]
    for prefix in _shared(names):
        short = [name.removeprefix(prefix) for name in names]
        compiled = sorted({module for name in short for module in _compiled_in(name)})
        for inner in ((), tuple(compiled)) if compiled else ((),):
            tensors, own = _taken(file, replace(layout, prefix=prefix, compiled=inner, among=others))
            if len(tensors) == len(names) and _fits(tensors, wanted):
                return tensors, own, "" if prefix == layout.prefix else _of_prefix(prefix)
    part = _one_part(file, wanted)
    if part is None:
        return dict(state), layout, ""
    tensors, own = _taken(file, replace(layout, prefix=part, compiled=(), among=others))
    large = [name for name, value in own.among.items() if not _is_small(value)]
    own = replace(own, among={n: v for n, v in own.among.items() if n not in large}, left=(*own.left, *large))
    return tensors, own, "" if part == layout.prefix else f"the names that begin with {part!r} fit, and were taken"


def _one_part(file: Mapping[str, Tensor], wanted: Collection[str]) -> str | None:
    """The only beginning of names behind which a whole network stands, beside others' names; None where there is none."""
    first = next((name for name in wanted if not name.endswith("num_batches_tracked")), "")
    parts = [name.removesuffix(first) for name in file if first and name.endswith(f".{first}")]
    fit = [
        part
        for part in parts
        if _fits({name.removeprefix(part): value for name, value in file.items() if name.startswith(part)}, wanted)
    ]
    return fit[0] if len(fit) == 1 else None


def without_extra(
    state: Mapping[str, Tensor], layout: Layout, wanted: Collection[str]
) -> tuple[dict[str, Tensor], Layout]:
    """Without the further states of modules, other than tensors, that the network does not ask for: these are carried along."""
    extra = {name: value for name, value in state.items() if not isinstance(value, Tensor) and name not in wanted}
    small = {name: value for name, value in layout.named(extra).items() if _is_small(value)}
    left = [name for name in layout.named(extra) if name not in small]
    own = {name: value for name, value in state.items() if name not in extra}
    return own, replace(layout, among={**layout.among, **small}, left=(*layout.left, *left))


def _of_prefix(prefix: str) -> str:
    named = prefix.split(".")[:-1]
    plain = all(f"{part}." in _WRAPPERS for part in named)
    return "" if plain else f"every name begins with {prefix!r}, without which all of them fit"


def _fits(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> bool:
    """Torch itself doesn't ask for the counts of old batch norms."""
    return tensors.keys() <= set(wanted) and all(
        name.endswith("num_batches_tracked") for name in wanted if name not in tensors
    )


def _taken(file: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], Layout]:
    """The tensors of a file by the names of its network; what has not its prefix, as counters, stands among them."""
    apart = {name: value for name, value in file.items() if not name.startswith(layout.prefix)}
    own = {name: value for name, value in file.items() if name not in apart}
    plain = {_without_compiled(name.removeprefix(layout.prefix), layout.compiled): each for name, each in own.items()}
    return plain, replace(layout, among={**layout.among, **apart})


def _wrappers(names: Iterable[str]) -> str:
    """What DistributedDataParallel and torch.compile have put in front of every name."""
    left = [name for name in names if name not in _COUNTERS]
    prefix = ""
    while more := next((each for each in _WRAPPERS if left and all(n.startswith(prefix + each) for n in left)), ""):
        prefix += more
    return prefix


def _shared(names: list[str]) -> Iterator[str]:
    """What all names begin with, by whole components: first nothing, then ever more."""
    prefix = ""
    yield prefix
    while names and "." in (rest := names[0].removeprefix(prefix)):
        prefix += f"{rest.partition('.')[0]}."
        if not all(name.startswith(prefix) for name in names):
            return
        yield prefix


def _compiled_in(name: str) -> Iterator[str]:
    """The modules in a name behind which `_orig_mod` stands."""
    plain: list[str] = []
    for part in name.split("."):
        if part == _COMPILED:
            yield ".".join(plain)
        else:
            plain.append(part)


def _without_compiled(name: str, compiled: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED) if compiled else name


def _with_compiled(name: str, compiled: tuple[str, ...]) -> str:
    if not compiled:
        return name
    parts = name.split(".")
    whole = [[_COMPILED] * (".".join(parts[:i]) in compiled) + [part] for i, part in enumerate(parts)]
    return ".".join(part for each in whole for part in each)


# --- what stands beside -------------------------------------------------------------------------------------------------------


def _beside(content: Mapping[Any, Any], keys: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Everything but the weights: what is small and plain, and the names of the rest, as an optimiser's state."""
    small: dict[str, Any] = {}
    left: list[str] = []
    for name, value in content.items():
        if name == keys[0] and len(keys) > 1:
            inner, more = _beside(value, keys[1:])
            small |= {name: inner} if inner else {}
            left += [f"{name}.{each}" for each in more]
        elif name not in (keys[0], manifest.KEY):
            if _is_small(name) and _is_small(value) and not _is_weights(value):
                small[name] = value
            else:
                left.append(str(name))
    return small, left


def _is_small(value: object) -> bool:
    """Whether weights_only reads it, and it is no great matter: numbers, words and small tensors in plain containers, and no
    optimiser's state, which is of other parameters."""
    waiting: list[Any] = [value]
    room = _ROOM
    while waiting and room > 0:
        part = waiting.pop()
        room -= _PLAIN
        if type(part) in (dict, OrderedDict):
            if {"state", "param_groups"} <= part.keys():
                return False
            waiting += [*part, *part.values()]
        elif type(part) in (list, tuple, set):
            waiting += part
        elif type(part) is Tensor and part.layout is torch.strided and not part.is_meta:
            room -= part.untyped_storage().nbytes()
        elif type(part) is str:
            room -= len(part)
        elif part is not None and type(part) not in (bool, int, float):
            return False
    return not waiting and room > 0
