"""What a pickle would do, read off its instructions before any of them is carried out.

>>> fault(Path("layers.pt"))
'it calls torch.nn.modules.transformer.Transformer'

torch's weights_only reader calls whatever is on its list with whatever a file says: a layer of ten thousand layers, a bytearray
of eight gigabytes, a tensor of four terabytes that shows one number. torch.save writes a module as an empty object and its
attributes, and calls nothing but what puts tensors and plain values together; so nothing else passes here. Instructions that
torch's reader does not know end the reading: it refuses them itself.
"""

import mmap
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from struct import unpack
from typing import Any

import torch

from normrewrite.files import scalars
from normrewrite.files.arguments import ARGUMENTS, Global

PACKAGES = ("torch.nn.modules.", "normrewrite.nn.", "torchvision.", "timm.", "transformers.")
_DICTS, _TOLD = ("dict", "collections.OrderedDict"), 100  # what state_dicts are; globals whose place is looked for
_STOP = pickle.STOP[0]
_PICKLES = 5  # in a file of the format before torch 1.6: magic number, protocol, system, content, keys of storages
_LARGEST = 1 << 28  # bytes that all tensors may have beyond four times what their storages hold
_LONGEST_KEY = 100  # things in a tuple that is a key: it is hashed all through
_WIDEST_KEY = 1 << 60  # a number that is a key: Python's hashes of larger ones meet
_COUNTS, _MANY = ("num_layers",), 10_000  # attributes by which torch's own layers go on counting while they are read
_BYTES = {  # of one number in a storage, by the name of its class
    **dict.fromkeys(("ComplexDouble",), 16),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
}
_NESTED = 1_000_000  # things in a tuple, counted at each place where they stand


class Wrong(Exception):
    """What torch.save would not write, in words."""


class Unknown(Exception):
    """What torch's reader does not know either."""


def fault(path: Path, free: Collection[str] = ()) -> str | None:
    """What a torch file does that torch.save never writes, in words; None where there is no such thing.

    Both formats of torch are read, that of before 1.6 too. free: dotted names of globals that may be called with anything.
    Raises Wrong for what nobody should even look at again, Unknown for what torch's reader does not know either, and whatever
    comes of damage.
    """
    return _read(path, free).wrong


def entries(path: Path) -> tuple[dict[str, str], set[str]]:
    """In which entry of a file's dict each global that it asks for stands first; and the entries that are dicts themselves."""
    reader = _read(path, ())
    return reader.entries, reader.dicts


def _read(path: Path, free: Collection[str]) -> "Reader":
    return _archive(path, free) if is_archive(path) else _pickles(path, free)


def is_archive(path: Path) -> bool:
    """Whether a file is of torch's present format, a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _pickles(path: Path, free: Collection[str]) -> "Reader":
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        reader, at = Reader(len(content), None, free), 0
        for _ in range(_PICKLES):
            at = reader.read(content, at)
    return reader


def _archive(path: Path, free: Collection[str]) -> "Reader":
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    sizes = {entry.filename: entry.file_size for entry in entries}
    if len(sizes) < len(entries) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Wrong("its parts are compressed or there twice")
    storages = {name.partition("/data/")[2]: size for name, size in sizes.items()}
    reader = Reader(path.stat().st_size, storages, free)
    reader.read(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"), 0)
    return reader


class Made:
    """Something that the file puts together; `by`: what by. A storage has its bytes, and those of one number; of a list,
    whether what it holds may be in a set."""

    __slots__ = ("by", "hashed", "itemsize", "nbytes")

    def __init__(self, by: str, nbytes: int = 0, itemsize: int = 1) -> None:
        self.by, self.nbytes, self.itemsize, self.hashed = by, nbytes, itemsize, True


class Tuple(tuple[Any, ...]):
    """A tuple, with how many things are in it at all depths."""

    extent: int

    def __new__(cls, items: Collection[Any]) -> "Tuple":
        made = super().__new__(cls, items)
        made.extent = 1 + sum(item.extent if isinstance(item, Tuple) else 1 for item in items)
        if made.extent > _NESTED:
            raise Wrong("tuples in it are nested without end")
        return made


class Reader:
    """Goes through the instructions of one file of `size` bytes; `wrong` is the first call that torch.save never writes.

    storages: bytes of each by its key, where the file says so elsewhere. free: globals that may be called with anything.
    """

    def __init__(self, size: int, storages: Mapping[str, int] | None, free: Collection[str]) -> None:
        self.size, self.known, self.free = size, storages, free
        self.wrong: str | None = None
        self.entries: dict[str, str] = {}
        self.dicts: set[str] = set()
        self.waiting: dict[str, list[Any]] = {}
        self.storages: dict[str, Made] = {}
        self.held = self.claimed = 0

    def read(self, content: bytes | mmap.mmap, at: int) -> int:
        """Go through the pickle that begins there; where it ends. Raises Wrong for what torch.save would not write, Unknown
        for what torch's reader refuses, and whatever comes of damage."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        while (code := content[at]) != _STOP:
            if code not in _STEPS:
                raise self._unknown()
            (step, width), at = _STEPS[code], at + 1
            if isinstance(width, str):
                argument, at = ARGUMENTS[width](content, at)
            else:
                argument, at = content[at : at + width], at + width
                if len(argument) < width:
                    raise EOFError("the pickle has no end")
            step(self, argument)
        return at + 1

    # --- the instructions ---------------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _global(self, name: Global) -> None:
        """With what the outermost dict is to get so far; which of that are its keys shows once it gets them."""
        if self.marks[:1] == [1] and len(self.waiting) < _TOLD:
            self.waiting.setdefault(name, self.stack[1 : self.marks[1] if len(self.marks) > 1 else None])
        self.stack.append(name)

    def _mark(self, _: bytes) -> None:
        self.marks.append(len(self.stack))

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _tuple(self, count: int | None) -> None:
        items = self._marked() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(Tuple(items))

    def _put(self, index: bytes) -> None:
        self.memo[int.from_bytes(index, "little")] = self.stack[-1]

    def _get(self, index: bytes) -> None:
        self.stack.append(self.memo[int.from_bytes(index, "little")])

    def _append(self, many: bool) -> None:
        items = self._marked() if many else [self.stack.pop()]
        self.stack[-1].hashed = self.stack[-1].hashed and all(map(_may_be_key, items))

    def _set(self, many: bool) -> None:
        items = self._marked() if many else [self.stack.pop(), self.stack.pop()][::-1]
        if len(self.stack) == 1:
            self._place(items)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _may_be_key(key):
                raise Wrong("a dict in it has a key that no checkpoint has")
            if key in _COUNTS and isinstance(value, int) and value > _MANY:
                raise Wrong(f"it has {key} of more than {_MANY:,}")

    def _place(self, items: list[Any]) -> None:
        """The outermost dict's entries: a global stands in the last that was there already when it came."""
        keys = items[::2]
        self.dicts |= {str(key) for key, value in zip(keys, items[1::2], strict=True) if _made_by(value, *_DICTS)}
        for name, before in self.waiting.items():
            here = [key for key, then in zip(keys, before[::2], strict=False) if key is then and isinstance(key, str)]
            self.entries |= {name: here[-1]} if here else {}
        self.waiting.clear()

    def _new(self, _: bytes) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if arguments != () and not self._is_free(cls):
            self._note(f"it makes {cls} with arguments")
        self.stack.append(Made(str(cls)))

    def _is_free(self, value: object) -> bool:
        return isinstance(value, Global) and value in self.free

    def _reduce(self, _: bytes) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(function, arguments))

    def _called(self, function: Any, arguments: Any) -> Made:
        if self._is_free(function):
            return Made(str(function))
        call = _CALLS.get(function) if isinstance(function, Global) else None
        if call is None or not isinstance(arguments, Tuple) or not call(self, *arguments):
            self._note(f"it calls {function}")
        return Made(str(function))

    def _build(self, _: bytes) -> None:
        state = self.stack.pop()
        made = self.stack[-1].by
        if made == scalars.DTYPE and isinstance(state, Tuple) and _plain(*state):
            return
        if made != "collections.OrderedDict" and not made.startswith(PACKAGES) and made not in self.free:
            self._note(f"it gives attributes to what {made} made")

    def _note(self, wrong: str) -> None:
        """Kept, and the reading goes on: a name that is not allowed is told before a call of it."""
        self.wrong = self.wrong or wrong

    def _unknown(self) -> Exception:
        """What ends the reading here: torch's reader would do all that stands before."""
        return Unknown() if self.wrong is None else Wrong(self.wrong)

    def _storage(self, _: bytes) -> None:
        identity = self.stack.pop()
        if not isinstance(identity, Tuple) or identity[0] not in ("storage", b"storage"):
            raise self._unknown()  # a module, of the format before torch 1.6
        of, key, _, numel = identity[1:5]
        if not isinstance(key, str):
            raise ValueError("a storage in it has no name")
        if key not in self.storages:
            itemsize = _BYTES[of.rpartition(".")[2].removesuffix("Storage")]
            here = self.size if self.known is None else self.known[key]
            self.held += numel * itemsize
            if not 0 <= numel * itemsize <= here or (self.known is None and self.held > self.size):
                raise ValueError(f"a storage in it claims more than the {here:,} bytes that there are")
            self.storages[key] = Made("storage", numel * itemsize, itemsize)
        self.stack.append(self.storages[key])

    # --- what torch.save calls ----------------------------------------------------------------------------------------

    def _tensor(self, storage: Made, offset: int, size: Tuple, stride: Tuple, *rest: Any) -> bool:
        return self._within(storage, offset, size, stride, storage.itemsize)

    def _tensor_v3(
        self, storage: Made, offset: int, size: Tuple, stride: Tuple, _grad: Any, _hooks: Any, dtype: str, *rest: Any
    ) -> bool:
        return self._within(storage, offset, size, stride, getattr(torch, dtype.rpartition(".")[2]).itemsize)

    def _within(self, storage: Made, offset: int, size: Tuple, stride: Tuple, itemsize: int) -> bool:
        """A tensor has to stay in its storage; all together may show only so much more than there is."""
        size, stride = _sizes(size), _sizes(stride)
        numbers, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            numbers *= length
            last += (length - 1) * step
        if min((offset, *size, *stride)) < 0 or (numbers and (last + 1) * itemsize > storage.nbytes):
            raise ValueError(f"a tensor in it is larger than its storage of {storage.nbytes:,} bytes")
        self.claimed += numbers * itemsize
        if self.claimed > _LARGEST + 4 * self.held:
            raise Wrong(f"tensors in it show far more than the {self.held:,} bytes that their storages have")
        return True

    def _typed(self, function: Any, cls: Any, arguments: Any, *rest: Any) -> bool:
        return str(function) in _TENSORS and isinstance(self._called(function, arguments), Made)


def _may_be_key(value: object) -> bool:
    """Whether Python's hash of it is soon made, and is not that of other numbers too."""
    if isinstance(value, Tuple):
        return value.extent <= _LONGEST_KEY
    return not isinstance(value, int | float) or abs(value) < _WIDEST_KEY


def _sizes(value: Any) -> Tuple:
    """Sizes or strides: a tuple of numbers, which torch.Size may hold."""
    if not isinstance(value, Tuple) or not all(isinstance(each, int) for each in value):
        raise ValueError("a tensor in it has no sizes")
    return value


def _plain(*arguments: Any) -> bool:
    return all(isinstance(each, str | int | float | bytes | None) for each in arguments)


def _made_by(value: object, *what: str) -> bool:
    return isinstance(value, Made) and value.by in what


def _encoded(value: object) -> bool:
    return _made_by(value, "_codecs.encode")


def _text(reader: Reader, text: Any, encoding: Any = None) -> bool:
    return isinstance(text, str) and encoding in ("latin1", "latin-1")


_Call = Callable[..., bool]
_TENSORS: dict[str, _Call] = {
    "torch._utils._rebuild_tensor": Reader._tensor,
    "torch._utils._rebuild_tensor_v2": Reader._tensor,
    "torch._utils._rebuild_tensor_v3": Reader._tensor_v3,
    "torch._utils._rebuild_qtensor": Reader._tensor,
    "torch._utils._rebuild_parameter": lambda reader, data, *rest: isinstance(data, Made),
    "torch._utils._rebuild_parameter_with_state": lambda reader, data, *rest: isinstance(data, Made),
    "torch._utils._rebuild_sparse_tensor": lambda reader, layout, data: True,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda reader, *rest: True,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda reader, data, *rest: isinstance(data, Made),
}
_CALLS: dict[str, _Call] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": Reader._typed,
    "torch.serialization._get_layout": lambda reader, name: _plain(name),
    "torch.Size": lambda reader, sizes: isinstance(sizes, Tuple),
    "torch.device": lambda reader, *rest: _plain(*rest),
    "collections.OrderedDict": lambda reader, *rest: len(rest) < 2,
    "collections.Counter": lambda reader, *rest: len(rest) < 2,
    "builtins.set": lambda reader, items: isinstance(items, Made) and items.hashed,
    "builtins.complex": lambda reader, *rest: _plain(*rest),
    "builtins.bytearray": lambda reader, *rest: all(map(_encoded, rest)) or _text(reader, *rest),
    "_codecs.encode": _text,
    scalars.DTYPE: lambda reader, code, *rest: isinstance(code, str) and bool(scalars.KIND.fullmatch(code)),
    **dict.fromkeys(scalars.NUMBERS, lambda reader, dtype, data: _made_by(dtype, scalars.DTYPE) and _encoded(data)),
}
# Instructions: what each does, and its argument: so many bytes, or one of ARGUMENTS.
_Step = Callable[[Reader, Any], None]
_STEPS: dict[int, tuple[_Step, int | str]] = {
    code[0]: (step, argument)
    for code, step, argument in (
        (pickle.PROTO, lambda reader, _: None, 1),
        (pickle.GLOBAL, Reader._global, "global"),
        (pickle.BININT, Reader._push, "int"),
        (pickle.BININT1, lambda reader, data: reader._push(data[0]), 1),
        (pickle.BININT2, lambda reader, data: reader._push(int.from_bytes(data, "little")), 2),
        (pickle.LONG1, lambda reader, data: reader._push(pickle.decode_long(data)), "short"),
        (pickle.BINFLOAT, lambda reader, data: reader._push(unpack(">d", data)[0]), 8),
        (pickle.BINUNICODE, Reader._push, "text"),
        (pickle.SHORT_BINSTRING, Reader._push, "short"),
        (pickle.NONE, lambda reader, _: reader._push(None), 0),
        (pickle.NEWTRUE, lambda reader, _: reader._push(True), 0),
        (pickle.NEWFALSE, lambda reader, _: reader._push(False), 0),
        (pickle.EMPTY_DICT, lambda reader, _: reader._push(Made("dict")), 0),
        (pickle.EMPTY_LIST, lambda reader, _: reader._push(Made("list")), 0),
        (pickle.EMPTY_SET, lambda reader, _: reader._push(Made("set")), 0),
        (pickle.EMPTY_TUPLE, lambda reader, _: reader._push(Tuple(())), 0),
        (pickle.MARK, Reader._mark, 0),
        (pickle.TUPLE, lambda reader, _: reader._tuple(None), 0),
        (pickle.TUPLE1, lambda reader, _: reader._tuple(1), 0),
        (pickle.TUPLE2, lambda reader, _: reader._tuple(2), 0),
        (pickle.TUPLE3, lambda reader, _: reader._tuple(3), 0),
        (pickle.BINPUT, Reader._put, 1),
        (pickle.LONG_BINPUT, Reader._put, 4),
        (pickle.BINGET, Reader._get, 1),
        (pickle.LONG_BINGET, Reader._get, 4),
        (pickle.APPEND, lambda reader, _: reader._append(False), 0),
        (pickle.APPENDS, lambda reader, _: reader._append(True), 0),
        (pickle.SETITEM, lambda reader, _: reader._set(False), 0),
        (pickle.SETITEMS, lambda reader, _: reader._set(True), 0),
        (pickle.NEWOBJ, Reader._new, 0),
        (pickle.REDUCE, Reader._reduce, 0),
        (pickle.BUILD, Reader._build, 0),
        (pickle.BINPERSID, Reader._storage, 0),
    )
}
